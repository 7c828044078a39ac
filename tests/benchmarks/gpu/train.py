"""Training: the product's loop on batches in memory, and its model alone against diffusers' of the same size."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.diffusion.objectives import Objective, TimestepDensity
from pipeline.model.adapters import build_dit_transformer2d
from pipeline.model.dit import DiT
from pipeline.stream.data import Batch
from pipeline.train.loop import Callbacks, Settings, module_flops, train, train_flops
from pipeline.train.parallel import wrap
from pipeline.train.state import Track, make_state
from pipeline.train.task import Task
from tests.benchmarks.gpu.device import Bench, Kernels, fitting, medians
from tests.benchmarks.gpu.shapes import Dit, Scale

STEP_HEADS = {
    "model": "training step",
    "compile": "compile",
    "batch": "batch",
    "steps_per_s": "steps/s",
    "images_per_s": "images/s",
    "of_measured_peak": "MFU, measured peak",
    "of_datasheet_peak": "MFU, data sheet",
    "device_busy": "device busy",
    "peak_memory_gib": "peak GiB",
}
PASS_HEADS = {
    "model": "forward + backward",
    "compile": "compile",
    "batch": "batch",
    "images_per_s": "images/s",
    "diffusers_images_per_s": "diffusers'",
    "to_diffusers": "ratio",
    "of_measured_peak": "MFU, measured peak",
}
_POOL = 4  # distinct batches
_NEVER = 1 << 60


class NoCheckpoints:
    """What the loop asks of its checkpoints, answered by a run that starts afresh and keeps nothing."""

    def load_newest(self, *_: object, **__: object) -> None:
        """There is none."""

    def save(self, *_: object) -> None:
        """None is kept."""

    def wait(self) -> None:
        """None is on its way."""


class Clock:
    """Told by the loop after every round of steps; the round after the counted ones runs under the profiler."""

    def __init__(self, bench: Bench, rounds: int) -> None:
        self._bench, self._kernels = bench, Kernels(bench)
        self._first, self._last = bench.warmup, bench.warmup + rounds
        self._marks: list[float] = []
        self.kernel_s: float | None = None

    @property
    def rounds(self) -> int:
        """Rounds the loop has to do in all."""
        return self._last + 1

    @property
    def seconds(self) -> float:
        """Median of the counted rounds."""
        marks = self._marks[self._first - 1 : self._last]
        return statistics.median(b - a for a, b in pairwise(marks))

    def __call__(self, record: dict[str, Any]) -> None:
        self._marks.append(self._bench.now())
        if len(self._marks) == self._last:
            self._kernels.start()
        elif len(self._marks) > self._last:
            self.kernel_s = self._kernels.stop()


def figures(bench: Bench, scale: Scale) -> Iterator[dict[str, Any]]:
    """One row a model and form, of the training step."""
    for name, size in scale.models.items():
        for compiled in bench.compiled:
            found = fitting(bench, f"train {name}", size.batch, partial(step, bench, scale, size, compiled))
            bench.release()
            if found is not None:
                yield {"model": name, "compile": compiled, "batch": found[0], **found[1]}


def pass_figures(bench: Bench, scale: Scale) -> Iterator[dict[str, Any]]:
    """One row a model and form, of forward and backward alone."""
    for name, size in scale.models.items():
        for compiled in bench.compiled:
            what = f"forward + backward {name}"
            found = fitting(bench, what, size.batch, partial(passes, bench, scale, size, compiled))
            bench.release()
            if found is not None:
                yield {"model": name, "compile": compiled, "batch": found[0], **found[1]}


def make_dit(size: Dit) -> DiT:
    """The product's model with random weights."""
    torch.manual_seed(0)
    shape = {"hidden": size.hidden, "depth": size.depth, "heads": size.heads, "patch": 2}
    return DiT(latent_channels=size.channels, num_classes=size.classes, **shape)


def make_diffusers_dit(size: Dit) -> nn.Module:
    """diffusers' DiTTransformer2DModel of equal width, depth and heads, its label dropout off."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        kind="dit_transformer2d",
        sample_size=size.side,
        patch=2,
        heads=size.heads,
        head_dim=size.hidden // size.heads,
        depth=size.depth,
        activation_checkpointing=False,
        sides=SimpleNamespace(take=lambda *_: True),
    )
    return build_dit_transformer2d(config, latent_channels=size.channels, num_classes=size.classes, text_dim=None)


@torch.no_grad()
def as_trained(model: nn.Module) -> nn.Module:
    """The model, with random values where its weights start at zero: nothing is to be won by products with zeros."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def forward_flops(size: Dit, side: int | None = None) -> int:
    """FLOPs of one forward pass of the product's model on one latent (of another side than it is trained on)."""
    side = size.side if side is None else side
    return module_flops(lambda: make_dit(size), shape=(size.channels, side, side), labelled=True)


def step(bench: Bench, scale: Scale, size: Dit, compiled: bool, batch: int) -> dict[str, Any]:
    """The loop, until it has done its rounds."""
    precision = "bf16" if bench.dtype == "bfloat16" else "fp32"
    bench.start_memory()
    with bench.device:
        model = as_trained(make_dit(size))
    engine = wrap(model, device=bench.device, precision=precision, compiled=compiled, blocks=list(model.blocks))
    track = Track("ema", sigma_rel=0.05)
    state = make_state(model, tracks=(track,), seed=0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    clock = Clock(bench, scale.rounds)
    round_images = batch * scale.steps
    settings = Settings(
        images=round_images * clock.rounds,
        batch_size=batch,
        micro_batch=batch,
        learning_rate=1e-4,
        precision=precision,
        log_images=round_images,
        checkpoint_images=_NEVER,
    )
    stream = batches(size, batch)
    train(
        state,
        engine,
        make_task(size),
        lambda _step: stream,
        settings,
        NoCheckpoints(),
        callbacks=Callbacks(log=clock),
    )
    if state.skipped_steps:
        bench.say(f"{state.skipped_steps} steps were skipped for their loss or gradient: the figure is too good")
    rate, memory = round_images / clock.seconds, bench.peak_memory_gib()
    flops = train_flops(forward_flops(size))
    return {
        "steps_per_s": rate / batch,
        "images_per_s": rate,
        "flops_per_image": flops,
        **bench.shares(rate * flops),
        "device_busy": None if clock.kernel_s is None else clock.kernel_s / clock.seconds,
        "peak_memory_gib": memory,
    }


def make_task(size: Dit) -> Task:
    """The default learning problem: rectified flow, logit-normal times, labels dropped for guidance."""
    zeros, ones = torch.zeros(size.channels), torch.ones(size.channels)
    return Task(Objective("flow"), TimestepDensity(), zeros, ones, size.classes, label_dropout=0.1, seed=0)


def batches(size: Dit, batch: int) -> Iterator[Batch]:
    """Endless batches over a few kept in memory, as the stream gives them; every round has another epoch's noise."""
    rng = np.random.default_rng(0)
    pool = [
        (
            rng.standard_normal((batch, *size.latent), dtype=np.float32).astype(np.float16),
            rng.integers(0, 1 << 63, (batch, 2), dtype=np.uint64),
            rng.integers(0, size.classes, batch, dtype=np.int64),
        )
        for _ in range(_POOL)
    ]
    same = {"bucket": "", "captions": None, "sizes": None}
    for step in count():
        latents, ids, labels = pool[step % _POOL]
        yield Batch(step=step, epoch=step // _POOL, latents=latents, sample_ids=ids, labels=labels, **same)


def passes(bench: Bench, scale: Scale, size: Dit, compiled: bool, batch: int) -> dict[str, Any]:
    """Forward and backward of both models in turns."""
    with bench.device:
        ours, theirs = as_trained(make_dit(size)), as_trained(make_diffusers_dit(size))
    sides = {
        "ours": one_pass(bench, scale.steps, ours, list(ours.blocks), size, batch, compiled),
        "theirs": one_pass(bench, scale.steps, theirs, list(theirs.inner.transformer_blocks), size, batch, compiled),
    }
    seconds = medians(bench, scale.rounds, sides)
    rates = {name: batch * scale.steps / value for name, value in seconds.items()}
    return {
        "images_per_s": rates["ours"],
        "diffusers_images_per_s": rates["theirs"],
        "to_diffusers": rates["ours"] / rates["theirs"],
        **bench.shares(rates["ours"] * train_flops(forward_flops(size))),
    }


def one_pass(
    bench: Bench, steps: int, model: nn.Module, blocks: Sequence[nn.Module], size: Dit, batch: int, compiled: bool
) -> Callable[[], None]:
    """A round of forward and backward passes of `model`, compiled block by block as the training job does."""
    if compiled:
        for block in blocks:
            block.compile()
    x = torch.randn(batch, *size.latent, device=bench.device)
    t = torch.full((batch,), 0.5, device=bench.device)
    labels = torch.zeros(batch, dtype=torch.int64, device=bench.device)

    def work() -> None:
        for _ in range(steps):
            with bench.autocast():
                loss = model(x, t, labels).float().square().mean()
            loss.backward()
            model.zero_grad(set_to_none=True)

    return work
