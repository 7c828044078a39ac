"""Exports round-trip exactly, load in plain diffusers, and refuse everything that was tampered with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.diffusion.config import ObjectiveConfig
from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.solvers import Combination
from pipeline.errors import ConflictError, InputError
from pipeline.model.config import DiTConfig, ModelConfig, UNet2DConfig
from pipeline.model.info import CodecReference, ModelInfo
from pipeline.model.load import build_model, load_model
from pipeline.model.read import CARD_KEY, FILE_KEYS, MARKER, WEIGHTS_KEY, read_model
from pipeline.storage.root import Root
from pipeline.train.export import export_name, save_export

pytestmark = pytest.mark.integration

UNET = UNet2DConfig(block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8)
DIT = DiTConfig(hidden=32, depth=2, heads=2)


def an_export(
    config: ModelConfig = UNET, *, text_dim: int | None = None, **changes: Any
) -> tuple[nn.Module, ModelInfo]:
    torch.manual_seed(0)
    model = build_model(config, latent_channels=4, num_classes=3, text_dim=text_dim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    info = ModelInfo(
        model=config,
        objective=ObjectiveConfig(),
        latent_channels=4,
        num_classes=3,
        text_dim=text_dim,
        factor=8,
        latent_mean=(0.1, -0.2, 0.3, 0.0),
        latent_std=(1.0, 2.0, 0.5, 4.0),
        codec=CodecReference(path="s3://user:hidden@models/vae", class_name="AutoencoderKL"),
        dataset={"uri": "s3://data/latents", "digest": "d1ce57"},
        fingerprint_digest="f1f2f3",
        run_id="run-7",
        images_seen=1_234_000,
        ema="ema_0.05",
        buckets=("256x256", "192x320"),
        license="cc-by-4.0",
    )
    return model.eval(), dataclasses.replace(info, **changes)


def answer(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        result: torch.Tensor = model(x, torch.tensor([0.25, 0.75]), torch.tensor([1, 3]))
    return result


@pytest.mark.parametrize(("config", "text_dim"), [(UNET, None), (DIT, None), (DIT, 6)])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_model_comes_back_bitwise(config: ModelConfig, text_dim: int | None, where: str, tmp_path: Path) -> None:
    uri = str(tmp_path / "export") if where == "local" else f"memory://exports/{tmp_path.name}"
    model, info = an_export(config, text_dim=text_dim)
    saved = save_export(uri, model, info)
    loaded, read = load_model(uri)
    assert read == saved == dataclasses.replace(info, weights_sha256=saved.weights_sha256)
    assert len(saved.weights_sha256) == 64
    assert torch.equal(answer(loaded), answer(model))
    assert not loaded.training
    assert [entry.key for entry in Root(uri).list()] == sorted([*FILE_KEYS, MARKER])


@pytest.mark.parametrize(
    ("text_dim", "told", "implied"),
    [
        (None, {}, ("class", "none")),
        (None, {"always_labelled": True, "guidable": False}, ("class",)),
        # One draw dropped both: neither was learned alone, or nothing tells that it was.
        (6, {}, ("class+text", "none")),
        (6, {"guidable": False}, ("class+text", "text")),
        (6, {"always_labelled": True, "guidable": False}, ("class+text",)),
    ],
)
def test_an_export_tells_what_it_was_trained_on_and_an_earlier_one_is_understood(
    text_dim: int | None, told: dict[str, bool], implied: tuple[Combination, ...], tmp_path: Path
) -> None:
    model, info = an_export(DIT, text_dim=text_dim, **told)
    assert "combinations" not in save_export(tmp_path / "earlier", model, info).to_json()
    assert read_model(str(tmp_path / "earlier")).info.trained_on == implied
    assert dataclasses.replace(info, combinations=implied) == info, "one form for what means the same"
    save_export(tmp_path / "now", model, dataclasses.replace(info, combinations=("class+text", "class")))
    assert read_model(str(tmp_path / "now")).info.trained_on == ("class+text", "class")
    with pytest.raises(InputError, match=r"combinations.1: Input should be 'class\+text', 'class', 'text' or 'none'"):
        ModelInfo.from_json({**info.to_json(), "combinations": ["class", "caption"]})


def test_plain_diffusers_loads_the_model_and_the_scheduler(tmp_path: Path) -> None:
    model, info = an_export(sampling_shift=2.0)
    save_export(tmp_path, model, info)
    plain = UNet2DModel.from_pretrained(tmp_path, subfolder="model", use_safetensors=True, low_cpu_mem_usage=False)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        direct = plain(x, torch.tensor([250.0, 750.0]), class_labels=torch.tensor([1, 3])).sample
    assert torch.equal(direct, answer(model))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.shift == 2.0


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear", "cosine"])
def test_the_ddim_scheduler_has_our_noise_levels(kind: Any, schedule: Any, tmp_path: Path) -> None:
    objective = ObjectiveConfig(kind=kind, schedule=schedule)
    model, info = an_export(objective=objective)
    save_export(tmp_path, model, info)
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.prediction_type == ("epsilon" if kind == "epsilon" else "v_prediction")
    alpha, _ = Objective(kind, schedule).alpha_sigma(torch.arange(1000) / 1000)
    assert torch.allclose(scheduler.alphas_cumprod, alpha.square(), rtol=3e-4)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999


def test_the_card_names_data_codec_license_and_hides_credentials(tmp_path: Path) -> None:
    model, info = an_export()
    saved = save_export(tmp_path, model, info)
    card = (tmp_path / CARD_KEY).read_text()
    for text in (
        "d1ce57",
        "f1f2f3",
        'license: "cc-by-4.0"',
        "run-7",
        "1,234,000",
        saved.weights_sha256,
        "s3://models/vae",
    ):
        assert text in card
    assert "hidden" not in card
    assert 'UNet2DModel.from_pretrained("THIS_DIRECTORY", subfolder="model")' in card
    model, info = an_export(DIT)
    save_export(tmp_path / "dit", model, info)
    assert "from_pretrained" not in (tmp_path / "dit" / CARD_KEY).read_text()


def test_the_marker_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, info = an_export()
    for stop_at in FILE_KEYS:
        root = Root(str(tmp_path / stop_at.replace("/", "_")))

        def put(self: Root, key: str, data: bytes, real: Any = Root.put, stop_at: str = stop_at) -> None:
            if key == stop_at:
                raise OSError("disk full")
            real(self, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(Root, "put", put)
            with pytest.raises(OSError, match="disk full"):
                save_export(root, model, info)
        with pytest.raises(
            InputError, match=r"no readable model[\s\S]*neither it nor a directory in it holds latentloom.json"
        ):
            load_model(root.uri)
        save_export(root, model, info)
        assert torch.equal(answer(load_model(root.uri)[0]), answer(model))


def test_the_same_export_again_is_nothing_and_another_is_a_conflict(tmp_path: Path) -> None:
    model, info = an_export()
    saved = save_export(tmp_path, model, info)
    before = (tmp_path / MARKER).stat().st_mtime_ns
    assert save_export(tmp_path, model, info) == saved
    assert (tmp_path / MARKER).stat().st_mtime_ns == before
    with pytest.raises(ConflictError, match="another exported model is already there"):
        save_export(tmp_path, model, dataclasses.replace(info, images_seen=5))
    assert read_model(str(tmp_path)).info == saved


def test_losing_the_race_for_the_marker_is_a_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, info = an_export()
    save_export(tmp_path, model, info)
    monkeypatch.setattr(Root, "exists", lambda self, key: False)
    with pytest.raises(ConflictError, match="already there"):
        save_export(tmp_path, model, dataclasses.replace(info, images_seen=5))


def test_the_longest_trained_export_of_a_run_is_found(tmp_path: Path) -> None:
    model, info = an_export()
    for images in (900, 10_000):
        save_export(tmp_path / export_name(images), model, dataclasses.replace(info, images_seen=images))
    (tmp_path / export_name(50_000) / "model").mkdir(parents=True)  # begun, never finished
    assert read_model(str(tmp_path)).info.images_seen == 10_000
    assert read_model(str(tmp_path / export_name(900))).uri.endswith("000000000900")


def test_info_survives_json_exactly() -> None:
    _, info = an_export()
    assert ModelInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"latent_channels": "4"}, "latent_channels"),
        ({"latent_std": [1.0, 2.0]}, "must have latent_channels = 4 entries"),
        ({"latent_std": [1.0, 0.0, 1.0, 1.0]}, "latent_std must be positive"),
        ({"latent_mean": [0.0, 0.0, 0.0, float("nan")]}, "latent_mean"),
        ({"run_id": None, "dataset": None}, "dataset"),
        ({"model": {"kind": "dit", "colour": 3}}, "colour"),
        ({"model": {"kind": "gan"}}, "gan"),
        ({"model": {"kind": "diffusers", "class": "AutoencoderKL", "config": {}}}, "'UNet2DModel', "),
        ({"objective": {"kind": "score"}}, "objective.kind"),
    ],
)
def test_info_is_strict(change: dict[str, Any], message: str) -> None:
    _, info = an_export()
    with pytest.raises(InputError, match=rf"not a description of an exported model[\s\S]*{message}"):
        ModelInfo.from_json(json.loads(json.dumps(info.to_json())) | change)


def rewrite(directory: Path, **changes: Any) -> None:
    document = json.loads((directory / MARKER).read_text())
    (directory / MARKER).write_text(json.dumps(document | changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_export(tmp_path, *an_export())
    return tmp_path


def test_unknown_versions_are_refused(saved: Path) -> None:
    rewrite(saved, version=4)
    with pytest.raises(InputError, match=r"unknown format[\s\S]*version 1"):
        load_model(str(saved))
    (saved / MARKER).write_text("[]")
    with pytest.raises(InputError, match="cannot be read: the document"):
        load_model(str(saved))
    (saved / MARKER).write_text("{")
    with pytest.raises(InputError, match="cannot be read: the document"):
        load_model(str(saved))


@pytest.mark.parametrize("name", ["../../secrets.safetensors", "/etc/passwd", "model/pytorch_model.bin"])
def test_files_outside_the_closed_list_are_refused(saved: Path, name: str) -> None:
    document = json.loads((saved / MARKER).read_text())
    files = document["files"]
    rewrite(saved, files=files | {name: files[WEIGHTS_KEY]})
    with pytest.raises(InputError, match="lists other files than it may"):
        load_model(str(saved))


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / "model" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"pickled weights[\s\S]*diffusion_pytorch_model.bin"):
        load_model(str(saved))


def test_changed_and_missing_weights_are_refused(saved: Path) -> None:
    path = saved / WEIGHTS_KEY
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="not those that the model is described with"):
        load_model(str(saved))
    path.unlink()
    with pytest.raises(InputError, match="lost its weights"):
        load_model(str(saved))


def with_matching_hash(directory: Path) -> None:
    """Make the description agree with the tampered weights, as a careful forger would."""
    import hashlib

    document = json.loads((directory / MARKER).read_text())
    document["files"][WEIGHTS_KEY]["sha256"] = hashlib.sha256((directory / WEIGHTS_KEY).read_bytes()).hexdigest()
    (directory / MARKER).write_text(json.dumps(document))


def test_weights_of_another_model_or_no_weights_are_refused(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS_KEY)
    weights.pop("conv_in.weight")
    save_file(weights, saved / WEIGHTS_KEY)
    with_matching_hash(saved)
    with pytest.raises(InputError, match=r"do not fit the model[\s\S]*conv_in.weight"):
        load_model(str(saved))
    (saved / WEIGHTS_KEY).write_bytes(b"not tensors")
    with_matching_hash(saved)
    with pytest.raises(InputError, match="unreadable weights"):
        load_model(str(saved))
