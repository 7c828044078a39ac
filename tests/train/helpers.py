"""A small problem that trains in milliseconds: 37 samples of 4x4 latents, a global order, shares by rank."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.diffusion.objectives import Objective, TimestepDensity
from pipeline.storage.root import Root
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.loop import Settings
from pipeline.train.parallel import wrap
from pipeline.train.state import Track, TrainState, make_state
from pipeline.train.task import Task

NUM_SAMPLES = 37
CHANNELS = 2
BATCH = 6


@contextmanager
def stopped_after(monkeypatch: pytest.MonkeyPatch, questions: int) -> Iterator[None]:
    """In here a worker that asks whether it should stop is told so at that question, one of which comes each step."""
    from pipeline.train import worker

    class StopsSoon(worker.StopWatch):
        asked = 0

        def requested(self) -> bool:
            self.asked += 1
            return self.asked == questions

    with monkeypatch.context() as patch:
        patch.setattr(worker, "StopWatch", StopsSoon)
        yield


class TinyNet(nn.Module):
    """Two convolutions, a block list, a time scale and class biases."""

    def __init__(self, channels: int = CHANNELS, num_classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.label = nn.Embedding(num_classes + 1, 8)
        self.last = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels_B: Tensor | None = None) -> Tensor:
        h = self.first(x) + t.view(-1, 1, 1, 1)
        if labels_B is not None:
            h = h + self.label(labels_B).view(len(x), -1, 1, 1)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.last(h)


@dataclass
class FakeBatch:
    epoch: int
    latents: np.ndarray
    sample_ids: np.ndarray
    labels: np.ndarray | None
    text: tuple[np.ndarray, ...] | None = None
    dataset: int = 0
    sizes: np.ndarray | None = None
    bucket: str = ""


def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """latents, ids, labels of the whole data set."""
    rng = np.random.default_rng(7)
    latents = rng.normal(size=(NUM_SAMPLES, CHANNELS, 4, 4)).astype(np.float32) * 3 + 1
    ids = rng.integers(0, 1 << 63, size=(NUM_SAMPLES, 2), dtype=np.uint64)
    return latents, ids, (np.arange(NUM_SAMPLES) % 3).astype(np.int64)


def fake_stream(
    rank: int = 0, world_size: int = 1, poison: tuple[int, ...] = ()
) -> Callable[[int], Iterator[FakeBatch]]:
    """A stream factory: batch k is a fixed choice of samples; rank r takes every world_size-th of them."""
    latents, ids, labels = samples()
    per_epoch = NUM_SAMPLES // BATCH

    def open_stream(start: int) -> Iterator[FakeBatch]:
        step = start
        while True:
            epoch = step // per_epoch
            order = np.random.default_rng(epoch).permutation(NUM_SAMPLES)
            at = (step % per_epoch) * BATCH
            mine = order[at : at + BATCH][rank::world_size]
            x = latents[mine].copy()
            if step in poison and rank == 0:
                x[0] = np.inf
            yield FakeBatch(epoch, x, ids[mine], labels[mine])
            step += 1

    return open_stream


def make_task(**changes: Any) -> Task:
    values: dict[str, Any] = {
        "objective": Objective(),
        "density": TimestepDensity(),
        "mean": torch.ones(CHANNELS),
        "std": torch.full((CHANNELS,), 3.0),
        "num_classes": 3,
        "label_dropout": 0.2,
        "seed": 11,
    }
    return Task(**{**values, **changes})


def make_settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "images": 20 * BATCH,
        "batch_size": BATCH,
        "micro_batch": BATCH,
        "learning_rate": 1e-2,
        "warmup_images": 3 * BATCH,
        "decay_images": 8 * BATCH,
        "log_images": 3 * BATCH,
        "checkpoint_images": 4 * BATCH,
    }
    return Settings(**{**values, **changes})


TRACKS = (Track("power", sigma_rel=0.1), Track("half", half_life_images=30.0))


def new_run(
    root: Path,
    *,
    strategy: str = "ddp",
    keep_last: int = 100,
    identity: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    **options: Any,
) -> tuple[TrainState, Any, CheckpointStore]:
    torch.manual_seed(5)
    model = TinyNet()
    engine = wrap(model, device=torch.device("cpu"), strategy=strategy, **options)
    state = make_state(
        model,
        tracks=TRACKS,
        seed=11,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.01,
        identity=identity,
        optimizer=optimizer,
    )
    store = CheckpointStore(Root(str(root / "checkpoints")), root / "staging", keep_last=keep_last)
    return state, engine, store


def plain(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, as a copy."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def snapshot(state: TrainState) -> dict[str, Tensor]:
    return {k: plain(v) for k, v in state.tensors().items()}


def assert_equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key} differs by {(a[key] - b[key]).abs().max()}"


def _entry(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
    # Here, where all has passed: torch's own threads, still alive at an ordinary exit, abort it now and then.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> None:
    """Run a module-level function on `world_size` new processes joined by gloo on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_entry, (world_size, port, function, args), nprocs=world_size)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
