"""Grids: fixed seeds, classes in turn, averaged weights, decoded on rank 0."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.diffusion.samplers import Solving
from pipeline.train import collectives
from pipeline.train import hooks as module
from pipeline.train.hooks import SampleGrid
from pipeline.train.state import TrainState
from tests.train.helpers import CHANNELS, make_task, new_run, on_ranks


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
