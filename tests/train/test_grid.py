"""Pictures while training: grids of fixed seeds, and how far draws are from the data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.codec.codec import codec_info
from pipeline.diffusion.samplers import Solving
from pipeline.errors import ConfigError
from pipeline.features import ExtractorConfig
from pipeline.features.statistics import Moments, frechet_between
from pipeline.media import contact_sheet
from pipeline.storage.root import Root
from pipeline.train import collectives, job
from pipeline.train import hooks as module
from pipeline.train.hooks import FeatureDistance, SampleGrid
from pipeline.train.retention import read_records
from pipeline.train.state import TrainState
from pipeline.train.task import Chunk
from tests.support.images import make_codec
from tests.train.dataset import make_dataset
from tests.train.helpers import CHANNELS, make_task, new_run, on_ranks
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The latents that reached the codec."""
    seen: list[torch.Tensor] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents.clone())
        return torch.zeros(len(latents), 16, 16, 3, dtype=torch.uint8)

    use_codec(monkeypatch, decode)
    return seen


def use_codec(patch: pytest.MonkeyPatch, decode: Callable[[torch.Tensor], torch.Tensor], factor: int = 4) -> None:
    codec = SimpleNamespace(decode=decode, info=SimpleNamespace(factor=factor))
    patch.setattr(module, "load_codec", lambda **_: codec)


def make_grid(shown: list[tuple[int, bytes]], **changes: Any) -> SampleGrid:
    def show(state: TrainState, png: bytes) -> None:
        shown.append((state.images, png))

    grid = SampleGrid(
        task=make_task(),
        ema="power",
        images=20,
        shape=(CHANNELS, 4, 4),
        solving=Solving("euler", 3, 2.0),
        codec={"path": "unused"},
        show=show,
    )
    return replace(grid, **changes)


def test_a_grid_is_the_same_picture_of_the_same_weights(tmp_path: Path, decoded: list[torch.Tensor]) -> None:
    state, _, _ = new_run(tmp_path)
    shown: list[tuple[int, bytes]] = []
    grid = make_grid(shown)
    state.images = 77
    assert grid.run(state) == {}
    first = torch.cat(decoded)
    decoded.clear()
    grid.run(state)
    assert torch.equal(first, torch.cat(decoded))
    assert first.shape == (20, CHANNELS, 4, 4)
    assert [n for n, _ in shown] == [77, 77]
    assert Image.open(io.BytesIO(shown[0][1])).format == "PNG"
    classes = grid.classes()
    assert classes is not None
    assert classes[:5] == [0, 1, 2, 0, 1]


def test_cells_are_told_by_the_names_of_their_classes(
    tmp_path: Path, decoded: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def sheet(images: list[bytes], captions: list[str]) -> bytes:
        told.extend(captions)
        return contact_sheet(images, captions)

    monkeypatch.setattr(module, "contact_sheet", sheet)
    make_grid([], images=4, names=("owl", "fox")).run(new_run(tmp_path)[0])
    assert told == ["owl", "fox", "class 2", "owl"]


def test_a_grid_shows_the_average_and_leaves_the_weights(tmp_path: Path, decoded: list[torch.Tensor]) -> None:
    state, _, _ = new_run(tmp_path)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    make_grid([]).run(state)
    for value in state.ema.averages["power"].values():
        value.mul_(0.5)
    make_grid([]).run(state)
    assert not torch.equal(torch.cat(decoded[:2]), torch.cat(decoded[2:]))
    assert all(torch.equal(v, before[k]) for k, v in state.model.state_dict().items())


def test_an_unconditional_grid_has_no_classes(tmp_path: Path, decoded: list[torch.Tensor]) -> None:
    state, _, _ = new_run(tmp_path)
    grid = make_grid([], task=make_task(num_classes=None), solving=Solving("euler", 2))
    assert grid.classes() is None
    grid.run(state)
    assert len(torch.cat(decoded)) == 20


def test_large_pictures_are_decoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        counts.append(len(latents))
        return torch.zeros(len(latents), 512, 512, 3, dtype=torch.uint8)

    use_codec(monkeypatch, decode, factor=128)  # of latents of 4 x 4
    state, _, _ = new_run(tmp_path)
    make_grid([]).run(state)
    assert counts == [4] * 5


def test_pictures_without_memory_are_left_out_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("planted: tried to allocate 48 GiB")

    use_codec(monkeypatch, decode)
    state, _, _ = new_run(tmp_path)
    shown: list[tuple[int, bytes]] = []
    assert make_grid(shown).run(state) == {}
    assert shown == []
    assert "no pictures at step 0, memory ran out: planted: tried to allocate 48 GiB" in caplog.text
    use_codec(monkeypatch, lambda latents: torch.zeros(1) / "planted")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        make_grid(shown).run(state)


def _sharded_in_bf16(folder: str) -> None:
    path = Path(folder)
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        blank = torch.zeros(16, 16, 16, 3, dtype=torch.uint8)
        use_codec(patch, lambda latents: (seen.append(latents), blank[: len(latents)])[1])
        state, _, _ = new_run(path / f"{collectives.rank()}", strategy="fsdp2", precision="bf16")
        make_grid([], collective=True, precision="bf16").run(state)
    if collectives.rank() == 0:
        torch.save(torch.cat(seen), path / "latents.pt")


@pytest.mark.integration
def test_shards_in_bf16_draw_the_picture_of_the_whole(tmp_path: Path, decoded: list[torch.Tensor]) -> None:
    state, _, _ = new_run(tmp_path)
    make_grid([]).run(state)
    on_ranks(2, _sharded_in_bf16, str(tmp_path))
    found, whole = torch.load(tmp_path / "latents.pt", weights_only=True), torch.cat(decoded)
    assert found.dtype == torch.float32
    assert 0 < float((found - whole).norm() / whole.norm()) < 0.02


# -- the distance of draws to the data -------------------------------------------------------------------------


def make_distance(**changes: Any) -> FeatureDistance:
    rng = np.random.default_rng(2)
    ids = torch.from_numpy(rng.integers(-(1 << 62), 1 << 62, (48, 2)))
    latents, labels = torch.from_numpy(rng.normal(size=(48, CHANNELS, 4, 4))).float(), torch.arange(48) % 3
    chunks = [Chunk(latents[at : at + 16], ids[at : at + 16], labels[at : at + 16]) for at in range(0, 48, 16)]
    extractor = ExtractorConfig(kind="torchscript", path="unused")
    given = {"task": make_task(), "ema": "power", "chunks": chunks, "solving": Solving("euler", 3, 1.0)}
    return FeatureDistance(**{**given, "codec": {"path": "unused"}, "extractor": extractor, **changes})


def use_networks(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A codec whose pixels are its latents, a feature network of means; the latents that reached the codec."""
    seen: list[torch.Tensor] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents.clone())
        return (latents[:, :3] * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    use_codec(patch, decode, factor=1)
    patch.setattr(module, "load_extractor", lambda *_, **__: lambda pixels: (pixel_means(pixels), None))
    return seen


def pixel_means(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32).mean(axis=1).reshape(len(pixels), -1)[:, :6]


def test_draws_are_compared_with_the_latents_whose_labels_and_ids_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = use_networks(monkeypatch)
    state, _, _ = new_run(tmp_path)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    distance = make_distance()
    figures = distance.run(state)
    real, drawn = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(real, torch.cat([chunk.latents for chunk in distance.chunks]))
    sets = [pixel_means(module.load_codec().decode(part).numpy()) for part in (real, drawn)]
    assert figures["distance/frechet"] == pytest.approx(frechet_between(*map(Moments.of, sets)), rel=1e-6)
    assert figures["distance/frechet_low"] < figures["distance/frechet"] < figures["distance/frechet_high"]
    assert {"distance/kid", "distance/kid_low", "distance/kid_high"} < set(figures)
    assert all(torch.equal(before[k], v) for k, v in state.model.state_dict().items())
    seen.clear()
    assert distance.run(state) == figures
    assert len(seen) == 3, "the data are decoded once, what is drawn every time"
    # Another label is another picture: what is drawn has the labels of the data.
    other = [replace(chunk, labels=(chunk.labels + 1) % 3) for chunk in distance.chunks]
    assert make_distance(chunks=other).run(state) != figures


def _measured(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_networks(patch)
        state, _, _ = new_run(Path(folder) / f"{collectives.rank()}", strategy="fsdp2")
        figures = make_distance().run(state)
    (Path(folder) / f"{collectives.rank()}.json").write_text(json.dumps(figures))


@pytest.mark.integration
def test_two_ranks_measure_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_networks(monkeypatch)
    state, _, _ = new_run(tmp_path)
    figures = make_distance().run(state)
    on_ranks(2, _measured, str(tmp_path))
    theirs = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert theirs[0] == pytest.approx(figures, rel=1e-4)
    assert theirs[1] == {}


@pytest.mark.integration
def test_a_run_measures_its_distance_with_a_real_codec_and_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_process(monkeypatch, tmp_path)
    codec, network = make_codec(tmp_path / "codec"), tmp_path / "network.pt"
    uri = make_dataset(tmp_path / "data", codec={**codec_info(str(codec)).as_dict(), "path": str(codec)})
    torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 6, 4, 4), torch.nn.Tanh())).save(str(network))
    extractor = {"kind": "torchscript", "path": str(network)}
    section = {"every_images": 96, "images": 48, "extractor": extractor, "sampler": {"steps": 2}}
    changes = {"train": {"images": 192, "decay_images": 0}, "distance": section}
    job.run(job_config(tmp_path, uri, changes))
    told = [r for r in read_records(Root(str(tmp_path / "run"))) if "distance/frechet" in r]
    assert [r["images"] for r in told] == [96, 192]
    assert all(r["distance/frechet"] > 0 for r in told)
    for wrong, key in (({"path": "nowhere.pt"}, "distance.extractor.path"), ({"kind": "classifier"}, "distance")):
        changed = {**changes, "distance": {**section, "extractor": {**extractor, **wrong}}}
        with pytest.raises(ConfigError, match=key):
            job.run(job_config(tmp_path / "wrong", uri, changed))
