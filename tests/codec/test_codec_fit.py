"""Fitting a codec: it learns, it is a function of its inputs, and its job claims, skips and refuses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.codec.codec import FITTED, codec_info, load_codec
from pipeline.codec.config import FitCodecJobConfig, FitConfig
from pipeline.codec.files import WEIGHTS
from pipeline.config import dump_yaml, load_config, validate
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.fit_codec import fit as fit_module
from pipeline.fit_codec import job
from pipeline.fit_codec.fit import collect_images, fit_codec
from pipeline.source.config import FolderSource, ImageConfig

pytestmark = pytest.mark.integration

SMALL: dict[str, Any] = {
    "images": 24,
    "holdout": 4,
    "block_out_channels": (8, 16),
    "norm_groups": 4,
    "latent_channels": 3,
    "steps": 6,
    "batch_size": 8,
    "warmup_steps": 2,
}


def _blobs(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images of one plain colour each: what a handful of steps can learn."""
    rng = np.random.default_rng(seed)
    return np.broadcast_to(rng.integers(0, 256, (count, 1, 1, 3), np.uint8), (count, 16, 16, 3)).copy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    directory = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(_blobs(32)):
        Image.fromarray(pixels).save(directory / f"{i:03d}.png")
    (directory / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    return directory


@pytest.fixture
def data(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "source": {"kind": "folder", "uri": str(folder)},
        "image": {"resolution": 16},
        "output": {"uri": str(tmp_path / "codec")},
        "fit": {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()},
        "tracking": {"enabled": False},
        "device": "cpu",
    }


def _config(data: dict[str, Any], **fit: Any) -> FitCodecJobConfig:
    return validate(FitCodecJobConfig, {**data, "fit": {**data["fit"], **fit}})


def _fit(directory: Path, **changes: Any) -> Any:
    return fit_codec(_blobs(24), _blobs(4, 1), FitConfig(**{**SMALL, **changes}), directory)


# -- the fit ---------------------------------------------------------------------------------------------------


def test_a_fit_is_a_function_of_its_inputs(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = _fit(tmp_path / "a")
    torch.manual_seed(2)  # the global generator has no part in it
    np.random.seed(3)
    second = _fit(tmp_path / "b")
    assert first == second
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    _fit(tmp_path / "c", seed=1)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() != (tmp_path / "c" / WEIGHTS).read_bytes()


def test_figures_are_those_of_the_saved_codec(tmp_path: Path) -> None:
    report = _fit(tmp_path)
    codec = load_codec(str(tmp_path))
    latents = codec.encode(torch.from_numpy(_blobs(24))).double()
    assert report.latents_mean == pytest.approx(latents.mean(dim=(0, 2, 3)).tolist(), rel=1e-4, abs=1e-5)
    assert report.latents_std == pytest.approx(latents.std(dim=(0, 2, 3), unbiased=False).tolist(), rel=1e-4)
    assert codec.info.scaling_factor == pytest.approx(1 / float(latents.std(unbiased=False)), rel=1e-4)
    holdout = torch.from_numpy(_blobs(4, 1))
    decoded = codec.decode(codec.encode(holdout))
    error = float((decoded.double() - holdout.double()).square().mean())
    assert report.psnr_db == pytest.approx(10 * np.log10(255**2 / error), abs=1e-2)
    assert (codec.info.class_name, codec.info.latent_channels, codec.info.factor) == ("AutoencoderKL", 3, 2)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    losses: list[float] = []
    fit_codec(
        _blobs(24),
        _blobs(4, 1),
        FitConfig(**{**SMALL, "steps": 160, "learning_rate": 2e-3}),
        tmp_path,
        on_step=lambda step, figures: losses.append(figures["loss"]),
    )
    assert len(losses) == 160
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:4])


def test_every_image_once_per_epoch() -> None:
    fit = FitConfig(**{**SMALL, "batch_size": 5})
    order = fit_module._order(7, fit)
    rows = torch.cat([next(order) for _ in range(7)]).reshape(5, 7)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in rows)
    assert len({tuple(epoch.tolist()) for epoch in rows}) > 1


def test_batches_larger_than_the_data() -> None:
    assert len(next(fit_module._order(3, FitConfig(**{**SMALL, "batch_size": 8})))) == 8


def test_learning_rate_rises_stays_and_falls_over_the_last_steps() -> None:
    fit = FitConfig(**{**SMALL, "steps": 100, "warmup_steps": 10, "learning_rate": 1.0})
    rates = [fit_module._learning_rate(step, fit) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[9:70] == pytest.approx([1.0] * 61)
    assert rates[-1] == pytest.approx(1 / 30)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), "must be uint8"),
        (np.zeros((0, 16, 16, 3), np.uint8), "must be uint8"),
        (np.zeros((2, 15, 16, 3), np.uint8), "no multiple of 2"),
    ],
)
def test_images_that_cannot_be_fitted(tmp_path: Path, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_codec(images, _blobs(1), FitConfig(**SMALL), tmp_path)


def test_a_loss_that_explodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fit_module._loss

    def exploding(*args: Any) -> Any:
        loss, figures = real(*args)
        return loss * float("inf"), figures

    monkeypatch.setattr(fit_module, "_loss", exploding)
    with pytest.raises(ConfigError, match=r"The loss became inf at step 1"):
        _fit(tmp_path)


# -- the images ------------------------------------------------------------------------------------------------


def test_the_choice_of_images_is_keyed_and_counted(folder: Path) -> None:
    source, image = FolderSource(uri=str(folder)), ImageConfig(resolution=16)
    everything = collect_images(source, image, 100, 100, 0)
    assert len(everything.train) + len(everything.holdout) == 32
    assert len(everything.holdout) == 32 // 5
    assert sum(everything.rejects.values()) == 1
    some, again, other = (collect_images(source, image, 10, 2, seed) for seed in (0, 0, 1))
    assert (len(some.train), len(some.holdout)) == (10, 2)
    assert np.array_equal(some.train, again.train)
    assert some.digest == again.digest != other.digest
    rows = {pixels.tobytes() for pixels in everything.train} | {p.tobytes() for p in everything.holdout}
    assert {pixels.tobytes() for pixels in some.train} <= rows


def test_too_few_images(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "broken.png").write_bytes(b"nothing")
    data["source"]["uri"] = str(tmp_path / "few")
    with pytest.raises(InputError, match=r"gives 0 usable images \(1 "):
        job.run(_config(data))
    assert not (tmp_path / "codec").exists()


# -- the job ---------------------------------------------------------------------------------------------------


def test_fits_then_skips(tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = job.run(_config(data))
    assert result.status == "done"
    assert result.counts["images"] == 24
    assert result.counts["holdout"] == 4
    codec = load_codec(result.outputs["codec"])
    assert codec.info.scaling_factor == pytest.approx(result.figures["scaling_factor"])
    weights = (tmp_path / "codec" / WEIGHTS).stat()
    monkeypatch.setattr(job, "_fit", lambda *args: pytest.fail("fitted again"))
    again = job.run(_config(data))
    assert (again.status, again.counts, again.figures) == ("unchanged", result.counts, result.figures)
    # Where it is tracked and on how many threads is not what it is.
    moved = {**data, "threads": 2, "tracking": {"enabled": False, "experiment": "other"}}
    assert job.run(_config(moved)).status == "unchanged"
    assert (tmp_path / "codec" / WEIGHTS).stat() == weights


def test_another_configuration_is_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    job.run(_config(data))
    before = {p: p.read_bytes() for p in (tmp_path / "codec").rglob("*") if p.is_file()}
    with pytest.raises(ConflictError, match=r"fit\.steps: 6 there, 7 here"):
        job.run(_config(data, steps=7))
    assert {p: p.read_bytes() for p in (tmp_path / "codec").rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("no_patience")
def test_a_crash_before_the_marker_is_fitted_again(
    tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.storage.root.Root.upload_dir", crash)
        with pytest.raises(KeyboardInterrupt):
            job.run(_config(data))
    assert not (tmp_path / "codec" / FITTED).exists()
    with pytest.raises(ConflictError, match=r"fit\.seed: 0 there, 5 here"):
        job.run(_config(data, seed=5))
    assert job.run(_config(data)).status == "done"
    assert (tmp_path / "codec" / FITTED).exists()


def test_another_process_claims_first(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both looked at an empty place; the other one was quicker.
    monkeypatch.setattr(job, "_finished_fit", lambda root, identity: None)
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / job.CLAIM).write_text('{"config_digest": "other", "config": {}}')
    with pytest.raises(ConflictError, match="another fingerprint"):
        job.run(_config(data))


def test_files_of_somebody_else(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConflictError, match=r"did not write, such as thesis\.txt"):
        job.run(_config(data))
    assert [p.name for p in (tmp_path / "codec").iterdir()] == ["thesis.txt"]


def test_output_that_is_a_file(tmp_path: Path, data: dict[str, Any]) -> None:
    (tmp_path / "codec").write_text("")
    with pytest.raises(InputError, match="The output is a file"):
        job.run(_config(data))


def test_output_that_cannot_be_read(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr("pipeline.storage.root.Root.kind", refuse)
    with pytest.raises(InputError, match=r"The output cannot be read: .*denied"):
        job.run(_config(data))


@pytest.mark.parametrize(("text", "message"), [("{", "Invalid JSON"), ("[]", "valid")])
def test_unreadable_claim(tmp_path: Path, data: dict[str, Any], text: str, message: str) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / job.CLAIM).write_text(text)
    with pytest.raises(InputError, match=message):
        job.run(_config(data))


def test_finished_codec_that_was_changed(tmp_path: Path, data: dict[str, Any]) -> None:
    job.run(_config(data))
    weights = tmp_path / "codec" / WEIGHTS
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(InputError, match="weights of the finished codec have changed"):
        job.run(_config(data))


def test_missing_source_writes_nothing(tmp_path: Path, data: dict[str, Any]) -> None:
    data["source"]["uri"] = str(tmp_path / "nowhere")
    with pytest.raises(InputError):
        job.run(_config(data))
    assert list(tmp_path.iterdir()) == []


def test_into_a_remote_store(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTLOOM_CACHE", str(tmp_path))
    data["output"]["uri"] = "memory://fitted/codec"
    result = job.run(_config(data))
    assert codec_info("memory://fitted/codec").latent_channels == 3
    assert job.run(_config(data)).figures == result.figures


def test_dry_run_counts_and_writes_nothing(tmp_path: Path, data: dict[str, Any]) -> None:
    result = job.dry_run(_config(data))
    assert (result.status, result.counts) == ("dry-run", {"entries": 33, "steps": 6})
    assert result.figures["fit_tflop"] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_tracked(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Any]] = {}

    class Recorder:
        run_id = handle = "r1"

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.setdefault(name, []).append((*args, *kwargs.values()))

        def wait_run_id(self, timeout_s: float) -> str:
            return "r1"

    monkeypatch.setattr("pipeline.runs.open_tracker", lambda *args, **kwargs: Recorder())
    config = _config(data)
    result = job.run(config)
    assert result.run_id == "r1"
    assert calls["log_text"] == [(dump_yaml(config), "config.yaml")]
    assert calls["log_params"][0][0]["fit.steps"] == 6
    assert [call[-1] for call in calls["log_input"]] == ["input", "output"]
    logged = [figures for figures, _ in calls["log_metrics"]]
    assert "fit/loss" in logged[0]
    assert logged[-1]["psnr_db"] == result.figures["psnr_db"]
    assert calls["finish"] == [("FINISHED",)]
    calls.clear()
    monkeypatch.setattr("pipeline.storage.root.Root.upload_dir", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        job.run(_config({**data, "output": {"uri": "memory://fitted/full"}}))
    assert calls["finish"] == [("FAILED",)]


# -- the configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": {"norm_groups": 5}}, "must divide every block_out_channels"),
        ({"fit": {"l1_weight": 0, "mse_weight": 0}}, "cannot both be 0"),
        ({"image": {"resolution": [16, 32]}}, "one square resolution"),
        ({"image": {"flip": True, "resolution": 16}}, "one square resolution"),
        ({"image": {"resolution": 17, "multiple_of": 1}}, "multiple of the factor 2"),
    ],
)
def test_settings_that_cannot_work(data: dict[str, Any], change: dict[str, Any], message: str) -> None:
    merged = {**data, **change, "fit": {**data["fit"], **change.get("fit", {})}}
    with pytest.raises(ConfigError, match=message):
        validate(FitCodecJobConfig, merged)


def test_config_reads_back(tmp_path: Path, data: dict[str, Any]) -> None:
    config = _config(data)
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    assert load_config(FitCodecJobConfig, [str(tmp_path / "c.yaml")]) == config
    assert json.loads(config.model_dump_json())["fit"]["steps"] == 6
