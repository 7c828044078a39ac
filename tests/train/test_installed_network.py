"""A network of another package: trained by the job, exported and loaded without a change to the pipeline."""

from __future__ import annotations

import sys
from pathlib import Path

import latentloom as ll
import pytest
import torch

from pipeline.errors import ConfigError, InputError
from pipeline.model.config import InstalledConfig
from pipeline.model.load import build_model
from pipeline.train import job
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process

PACKAGE = """
import torch
from torch import nn

class Mixer(nn.Module):
    def __init__(self, latent_channels, num_classes, text_dim, width=8):
        super().__init__()
        self.first, self.last = nn.Conv2d(latent_channels, width, 1), nn.Conv2d(width, latent_channels, 1)
        self.label, self.null_label = nn.Embedding((num_classes or 0) + 1, width), num_classes

    def forward(self, x_BCHW, t_B, labels_B=None, text_BLD=None, text_mask_BL=None):
        hidden = self.first(x_BCHW) + t_B[:, None, None, None]
        if labels_B is not None:
            hidden = hidden + self.label(labels_B)[:, :, None, None]
        return self.last(torch.tanh(hidden))

def number(latent_channels, num_classes, text_dim):
    return latent_channels
"""
POINTS = """[latentloom.models]
mixer = third_party_network:Mixer
number = third_party_network:number
gone = third_party_network:nothing
"""
FIT = {"latent_channels": 4, "num_classes": 3, "text_dim": None}


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "third_party_network.py").write_text(PACKAGE)
    metadata = tmp_path / "third_party_network-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-network\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "third_party_network", raising=False)


@pytest.mark.integration
@pytest.mark.usefixtures("_installed")
def test_it_is_trained_exported_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make_dataset(tmp_path / "latents")
    config = job_config(tmp_path, uri)
    network = InstalledConfig(name="mixer", options={"width": 12})
    config = config.model_copy(update={"model": network})
    in_one_process(monkeypatch, tmp_path)
    result = job.run(config)
    assert result.status == "done"
    model = ll.load_model(result.outputs["model"], device="cpu")
    assert model.info.model == network
    assert type(model.network).__name__ == "Mixer"
    assert model.network.first.out_channels == 12  # type: ignore[union-attr]
    with torch.no_grad():
        assert model.network(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.tensor([3])).shape == (1, 4, 8, 8)


@pytest.mark.integration
def test_a_training_does_not_begin_without_it(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "latents")
    config = job_config(tmp_path, uri).model_copy(update={"model": InstalledConfig(name="mixer")})
    with pytest.raises(ConfigError, match="No installed package offers this plug-in") as caught:
        job.dry_run(config)
    assert (caught.value.key, caught.value.value) == ("model.name", "mixer")


@pytest.mark.usefixtures("_installed")
def test_a_name_that_nobody_offers_has_its_neighbour_named() -> None:
    with pytest.raises(ConfigError, match="No installed package") as caught:
        build_model(InstalledConfig(name="mixr"), **FIT)
    assert caught.value.next_step == "did you mean mixer?"
    assert "mixer" in str(caught.value.rule)


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (InstalledConfig(name="gone"), "AttributeError"),
        (InstalledConfig(name="mixer", options={"depth": 3}), "unexpected keyword argument 'depth'"),
        (InstalledConfig(name="number"), "The entry point returned a int"),
    ],
)
def test_what_makes_no_network_is_named(network: InstalledConfig, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_model(network, **FIT)
    assert (caught.value.key, caught.value.value) == ("model.name", network.name)
    assert "latent_channels, num_classes, text_dim" in str(caught.value.rule)
