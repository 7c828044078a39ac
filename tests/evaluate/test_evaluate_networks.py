"""The evaluate job with networks from outside: their figures, contracts, caches, and what is said without them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from evaluate_networks import SmallInception, linear_weights, make_whole_clip, random_backbone, save_inception
from evaluate_world import config_of, real_images, write_codec, write_samples
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from jobs.quickstart import draw_shape, write_shapes
from pipeline.errors import InputError
from pipeline.evaluate.figures import Record
from pipeline.evaluate.job import run


class Eye(nn.Module):
    """Eight random features and logits of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x).relu().mean(dim=(2, 3))
        return features, self.head(features) * 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    write_shapes(str(folder / "real"), count=120, seed=0, size=32)
    pictures, labels = real_images(48, seed=5)
    prompts = ["a red circle" if i % 2 else "the sky" for i in range(48)]
    write_samples(str(folder / "samples"), pictures, [int(label) for label in labels], prompts)
    write_codec(folder / "codec")
    torch.manual_seed(1)
    torch.jit.script(Eye().eval()).save(str(folder / "eye.pt"))
    make_whole_clip(folder / "clip")
    safetensors.torch.save_file(random_backbone("alex"), folder / "alex.safetensors")
    safetensors.torch.save_file(linear_weights("alex"), folder / "linear.safetensors")
    return folder


def config(world: Path, report: str, **changes: Any) -> Any:
    outside: dict[str, Any] = {
        "output": {"uri": str(world / report)},
        "train": None,
        "classifier": {"enabled": False},
        "extractor": {"kind": "torchscript", "path": str(world / "eye.pt"), "resolution": 16},
        "clip": {"path": str(world / "clip")},
        "lpips": {"backbone": str(world / "alex.safetensors"), "linear": str(world / "linear.safetensors")},
        "reference_cache": str(world / "cache"),
    }
    return config_of(world, **(outside | changes))


def record_of(folder: Path) -> Record:
    record = Record.from_bytes((folder / "evaluation.json").read_bytes())
    assert record is not None
    return record


@pytest.mark.slow
def test_every_figure_has_its_interval_and_its_contract(world: Path) -> None:
    run(config(world, "report"))
    record = record_of(world / "report")
    figures = {f.name: f for f in record.figures}
    wanted = {"frechet", "kid", "precision", "recall", "inception_score", "clip_score", "lpips", "rfid"}
    assert wanted <= set(figures)
    for name in wanted:
        low, high = figures[name].low, figures[name].high
        assert low is not None
        assert high is not None
        assert low <= figures[name].value <= high
    assert 1 <= figures["inception_score"].value <= 5
    assert figures["clip_score"].n == 48
    assert figures["lpips"].n == figures["rfid"].n == 48
    assert "eye.pt" in figures["frechet"].method
    contract = record.contract
    assert contract["feature_extractor"] == "TorchScript eye.pt"
    assert contract["extractor_resize"] == "16x16, bilinear, antialiased"
    for key in ("extractor_sha256", "lpips_sha256", "clip_sha256"):
        assert len(contract[key]) == 64
    assert contract["reference_digest"] == record.inputs["reference"]["digest"]
    # There is no judge, and it is said which figures that costs.
    assert {"accuracy", "classifier_accuracy"} <= set(record.absent)
    assert "frechet" not in record.absent
    assert "not Inception" not in (world / "report" / "report.html").read_text()

    # The reference's statistics are kept by its digest, for other reports too, and taken anew for other eyes.
    (kept,) = (world / "cache" / "reference").iterdir()
    before = kept.stat().st_mtime_ns
    run(config(world, "again", clip=None, lpips=None, codec=None))
    assert kept.stat().st_mtime_ns == before
    assert record_of(world / "again").value("frechet") == record.value("frechet")
    other = {"kind": "torchscript", "path": str(world / "eye2.pt"), "resolution": 16}
    torch.manual_seed(2)
    torch.jit.script(Eye().eval()).save(str(world / "eye2.pt"))
    run(config(world, "third", clip=None, lpips=None, codec=None, extractor=other))
    assert len(list((world / "cache" / "reference").iterdir())) == 2


@pytest.mark.slow
def test_a_changed_file_is_another_evaluation(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "eye.pt"
    torch.jit.script(Eye().eval()).save(str(path))
    changes = {"extractor": {"kind": "torchscript", "path": str(path)}, "clip": None, "lpips": None, "codec": None}
    assert run(config(world, "changed", **changes)).status == "done"
    assert run(config(world, "changed", **changes)).status == "unchanged"
    torch.jit.script(Eye().eval()).save(str(path))
    assert run(config(world, "changed", **changes)).status == "done"


def test_a_missing_file_is_named_before_anything_is_read(world: Path) -> None:
    with pytest.raises(InputError, match=r"No such file[\s\S]*lpips\.linear"):
        missing = {"backbone": str(world / "alex.safetensors"), "linear": str(world / "none.pth")}
        run(config(world, "never", lpips=missing))
    assert not (world / "never").exists()


@pytest.mark.slow
def test_few_round_trips_have_no_distance_and_samples_without_prompts_no_clip_score(world: Path) -> None:
    pictures, labels = real_images(12, seed=6)
    write_samples(str(world / "bare"), pictures, [int(label) for label in labels])
    run(config(world, "few", samples={"uri": str(world / "bare")}, lpips=None, fidelity={"images": 6}))
    absent = record_of(world / "few").absent
    assert absent["clip_score"] == "no sample has a prompt"
    assert absent["rfid"] == "6 round trips are too few for a distance over 8 features"


class Features(nn.Module):
    """What torchmetrics takes as a feature network: uint8 images in, features out."""

    num_features = 8

    def __init__(self, inception: SmallInception) -> None:
        super().__init__()
        self.inception = inception

    def forward(self, x: Tensor) -> Tensor:
        return self.inception(x, return_features=True)


@pytest.mark.parametrize("known", [True, False])
def test_the_published_fid_is_that_of_torchmetrics_and_has_its_name_only_with_its_weights(
    world: Path, tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = save_inception(tmp_path / "inception.pt")
    if known:
        digest = hashlib.sha256((tmp_path / "inception.pt").read_bytes()).hexdigest()
        monkeypatch.setattr("pipeline.features.networks.INCEPTION_SHA256", digest)
    preset = {"fid": "published", "extractor": {"path": str(tmp_path / "inception.pt")}}
    run(config(world, f"published {known}", clip=None, lpips=None, codec=None, **preset))
    record = record_of(world / f"published {known}")

    theirs = FrechetInceptionDistance(Features(network))
    # Images of which neither side has resized anything, 32 x 32: the network reads 299 x 299.
    real = [draw_shape(0, i, 32) for i in range(120)]
    for pictures, is_real in ((np.stack(real), True), (real_images(48, seed=5)[0], False)):
        theirs.update(torch.from_numpy(pictures).permute(0, 3, 1, 2), real=is_real)
    assert record.value("frechet") == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert record.contract["extractor_resize"] == "none"
    if known:
        (figure,) = (f for f in record.figures if f.name == "fid")
        assert figure.value == record.value("frechet")
        assert "120 real ones and 48 samples" in figure.method
    else:
        assert record.value("fid") is None
        assert re.search(r"inception.pt \(SHA-256 .* is not .*f58cb9b6.*cannot be called FID", record.absent["fid"])
