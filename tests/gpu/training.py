"""Training: how fast a step is and what of it is not the model, sharded, and twice the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.storage.root import Root
from pipeline.stream.data import Batch
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.loop import Callbacks, Settings, train
from pipeline.train.parallel import wrap
from pipeline.train.state import Track, TrainState, make_state
from tests.benchmarks.gpu import train as rates
from tests.benchmarks.gpu.device import Bench, fitting, medians
from tests.benchmarks.gpu.shapes import Dit
from tests.gpu.ground import Ground, Lines

# Two runs that should be the same, where some kernel adds in no fixed order: relative to the largest weight.
SAME_TOLERANCE = 2e-3
SHARDED_TOLERANCE = 2e-2  # bfloat16 weights in the forward pass, against float32 ones that autocast rounds


def training_steps(ground: Ground) -> Lines:
    """The loop with batches in memory, compiled and in bfloat16: MFU, and what the step spends beside the model."""
    bench, scale = ground.bench(compiled=not ground.rehearsal), replace(ground.scale, rounds=2)
    lines: Lines = {}
    for name in [name for name in scale.models if name != "DiT-L/2"]:
        size = scale.models[name]

        def step(batch: int, size: Dit = size) -> dict[str, Any]:
            return rates.step(bench, scale, size, bench.compiled[0], batch)

        found = fitting(bench, f"train {name}", size.batch, step)
        bench.release()
        assert found is not None, f"{name} could not be trained: {bench.notes}"
        batch, row = found
        beside = beside_the_model(bench, size, batch)
        wanted = ("images_per_s", "of_measured_peak", "of_datasheet_peak", "device_busy", "peak_memory_gib")
        figures = {key: row[key] for key in wanted}
        lines[name] = {"batch": float(batch), **figures, "randomness and noising": beside * row["steps_per_s"]}
    return lines


def beside_the_model(bench: Bench, size: Dit, batch: int) -> float:
    """Seconds a micro-batch takes before and after a model that does nothing: keyed draws, noising, loss."""
    task, given = rates.make_task(size), next(rates.batches(size, batch))
    latents = torch.from_numpy(given.latents).to(bench.device).float()
    ids = torch.from_numpy(given.sample_ids.view("<i8")).to(bench.device)
    labels = torch.from_numpy(given.labels).to(bench.device)

    def nothing(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x

    return medians(bench, 5, {"": lambda: task.training_losses(nothing, latents, ids, labels, 0)})[""]


def fsdp(ground: Ground) -> Lines:
    """FSDP2 on the device's own backend: clip, fused AdamW, averages, a checkpoint saved and loaded to the bit."""
    backend = "gloo" if ground.rehearsal else "nccl"
    dist.init_process_group(backend, init_method=f"file://{ground.place / 'store'}", rank=0, world_size=1)
    try:
        size = next(iter(ground.scale.models.values()))
        plain = trained(ground, size, "plain", steps=4)
        sharded = trained(ground, size, "sharded", steps=4, strategy="fsdp2")
        again = fresh(ground, size, strategy="fsdp2")
        meta = store(ground.place / "sharded").load_newest(again.tensors(), again.check)
    finally:
        dist.destroy_process_group()
    assert meta is not None, "the checkpoint is not there"
    mine, loaded = whole(sharded), whole(again)
    unequal = [name for name, value in mine.items() if not torch.equal(value, loaded[name])]
    assert not unequal, f"{len(unequal)} of {len(mine)} tensors are not what was saved, such as {unequal[0]}"
    worst = apart(weights(sharded), weights(plain))
    assert worst <= SHARDED_TOLERANCE, f"weights differ by {worst:.2g} from those of one process"
    return {"": {"tensors": float(len(mine)), "from one process": worst, "tolerance": SHARDED_TOLERANCE}}


def equal_runs(ground: Ground) -> Lines:
    """Twice the same run, and once in two halves: the same weights, or within the stated tolerance."""
    size = next(iter(ground.scale.models.values()))
    first, second = (whole(trained(ground, size, name, steps=6)) for name in ("first", "second"))
    trained(ground, size, "halves", steps=3)
    halves = whole(trained(ground, size, "halves", steps=6))
    lines: Lines = {}
    for name, other in (("again", second), ("resumed", halves)):
        bitwise = all(torch.equal(value, other[key]) for key, value in first.items())
        worst = apart(other, first)
        assert worst <= SAME_TOLERANCE, f"{name}: tensors differ by {worst:.2g}, more than {SAME_TOLERANCE:g}"
        lines[name] = {"bitwise": str(bitwise), "largest difference": worst, "tolerance": SAME_TOLERANCE}
    return lines


def fresh(ground: Ground, size: Dit, *, strategy: str = "ddp") -> TrainState:
    """Model, optimiser and averages before the first step."""
    return _start(ground, size, strategy)[0]


def _start(ground: Ground, size: Dit, strategy: str) -> tuple[TrainState, Any]:
    precision = "fp32" if ground.rehearsal else "bf16"
    model = rates.make_dit(size)
    engine = wrap(model, device=ground.device, precision=precision, strategy=strategy, blocks=list(model.blocks))
    track = Track("ema", sigma_rel=0.05)
    state = make_state(model, tracks=(track,), seed=0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    return state, engine


def store(place: Path) -> CheckpointStore:
    """Checkpoints below a folder."""
    return CheckpointStore(Root(str(place)), place.with_name(f"{place.name}-staging"))


def trained(ground: Ground, size: Dit, name: str, *, steps: int, strategy: str = "ddp") -> TrainState:
    """Go on from the newest checkpoint of this name to so many steps, and leave one."""
    state, engine = _start(ground, size, strategy)
    batch = min(size.batch, 64)
    settings = Settings(
        images=steps * batch,
        batch_size=batch,
        micro_batch=batch,
        learning_rate=1e-3,
        precision="fp32" if ground.rehearsal else "bf16",
        checkpoint_images=1 << 60,
    )

    def stream(step: int) -> Iterator[Batch]:
        return itertools.islice(rates.batches(size, batch), step, None)

    train(state, engine, rates.make_task(size), stream, settings, store(ground.place / name), callbacks=Callbacks())
    assert state.skipped_steps == 0, f"{state.skipped_steps} steps had no usable loss or gradient"
    return state


def whole(state: TrainState) -> dict[str, Tensor]:
    """All that a checkpoint holds, unsharded, on the CPU."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu().clone()
        for name, value in state.tensors().items()
    }


def weights(state: TrainState) -> dict[str, Tensor]:
    """The model's part of it."""
    return {name: value for name, value in whole(state).items() if name.startswith("model/")}


def apart(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to the largest value of that tensor."""
    return max(
        float((ours[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-6))
        for name, value in reference.items()
        if value.is_floating_point()
    )
