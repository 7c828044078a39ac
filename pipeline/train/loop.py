"""The training loop, torch only: it knows neither Ray nor MLflow nor where batches come from.

Progress is counted in images. Every random number is keyed by (seed, sample id, epoch), so the same global
batches give the same gradients on any number of ranks (up to the order of float sums), and a run that was
killed and resumed is, on the same number of ranks, bitwise the run that was not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import PipelineError
from pipeline.train import collectives
from pipeline.train.state import TrainState
from pipeline.train.task import BatchLike, DeviceBatch, Forward, Task, on_device, widened_text

if TYPE_CHECKING:
    from pipeline.model.config import ModelConfig
    from pipeline.train.checkpoint import CheckpointStore


# -- The learning rate as a pure function of images seen, so that no scheduler object needs to be saved --------


def learning_rate(
    images: int,
    *,
    peak: float,
    warmup_images: int,
    decay_images: int,
    total_images: int,
    final_ratio: float = 0.0,
    shape: str = "cosine",
) -> float:
    """The rate of the step that brings the count of images to `images`.

    Linear from 0 to `peak` over the first `warmup_images`, flat, then from `peak` to `peak * final_ratio` over
    the last `decay_images` of `total_images`: "cosine" (half a period) or "linear". Raises ValueError for
    another shape.
    """
    if shape not in ("cosine", "linear"):
        raise ValueError(f"decay shape {shape!r}: there are cosine and linear")
    rate = peak
    if warmup_images > 0:
        rate *= min(1.0, images / warmup_images)
    into_decay = images - (total_images - decay_images)
    if decay_images > 0 and into_decay > 0:
        share = min(1.0, into_decay / decay_images)
        left = 1.0 - share if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        rate *= final_ratio + (1.0 - final_ratio) * left
    return rate


# -- How fast a run goes and what it waits for: images/s, share of time spent waiting for data, MFU, memory ----


# Dense bf16 tensor-core peaks without sparsity, FLOP/s, from the makers' data sheets; matched by prefix.
_PEAK_FLOPS = {
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA A100": 311.9e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181.05e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
}


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of a known device in FLOP/s, None of any other and of a part of one (MIG)."""
    if " MIG " in device_name:
        return None
    matches = [name for name in _PEAK_FLOPS if device_name.startswith(name)]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None


class Meter:
    """Time since the last reading, split into waiting for data and the rest; hooks and checkpoints are left out.

    flops_per_image (forward and backward) and peak (FLOP/s of one device times ranks) give MFU where both are known.
    """

    def __init__(self, flops_per_image: float | None = None, peak: float | None = None) -> None:
        self.flops_per_image, self.peak = flops_per_image, peak
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._images, self._wait_s, self._paused_s = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    def step(self, images: int) -> None:
        """One step over `images` images is done."""
        self._images += images

    def figures(self) -> dict[str, float]:
        """The figures since the last call."""
        elapsed = max(1e-9, time.perf_counter() - self._start - self._paused_s)
        rate = self._images / elapsed
        out = {"images_per_s": rate, "data_wait_share": self._wait_s / elapsed}
        if self.flops_per_image and self.peak:
            out["mfu"] = rate * self.flops_per_image / self.peak
        if torch.cuda.is_available():
            out["memory_bytes"] = float(torch.cuda.max_memory_allocated())
        self._reset()
        return out


NUM_BINS = 4
_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The numbers the loop needs; counts are of images over all ranks."""

    images: int
    batch_size: int
    micro_batch: int
    learning_rate: float
    warmup_images: int = 0
    decay_images: int = 0
    decay_final_ratio: float = 0.0
    decay_shape: str = "cosine"
    clip_norm: float = 1.0
    guard_norm: float = 1e4
    max_skipped_in_a_row: int = 10
    max_rollbacks: int = 2
    precision: str = "fp32"
    log_images: int = 1024
    checkpoint_images: int = 65536


@dataclass(frozen=True)
class Hook:
    """Something every rank does together each `every_images` images and at the end; returns figures to log."""

    every_images: int
    run: Callable[[TrainState], Mapping[str, float]]


@dataclass
class Engine:
    """The model as it is called while training: wrapped for its strategy, and how to hold back synchronisation."""

    forward: Forward
    without_sync: Callable[[bool], AbstractContextManager[Any]] = lambda _last: nullcontext()
    device: torch.device = _CPU


Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Callbacks:
    """How the outside follows a run; each is called on every rank, `log` always before the checkpoint of its step.

    should_stop: checkpoint and return. poll_due, on any rank: all ranks ask `preempted` at once; where it says yes
    they checkpoint and go on, for the node may stay, and who comes after it should lose nothing.
    """

    hooks: Sequence[Hook] = ()
    log: Log = lambda _record: None
    skip: Log = lambda _record: None
    resume: Callable[[TrainState], None] = lambda _state: None
    should_stop: Callable[[], bool] = lambda: False
    poll_due: Callable[[], bool] = lambda: False
    preempted: Callable[[], bool] = lambda: False
    after_step: Callable[[], object] = lambda: None


def train(
    state: TrainState,
    engine: Engine,
    task: Task,
    open_stream: Callable[[int], Iterator[BatchLike]],
    settings: Settings,
    checkpoints: CheckpointStore,
    *,
    callbacks: Callbacks | None = None,
    meter: Meter | None = None,
) -> str:
    """Train until `settings.images`; returns "done", or "stopped" after a checkpoint when a rank wants to stop.

    open_stream(step) yields this rank's share of every global batch from `step` on. Raises PipelineError when
    too many steps in a row had to be skipped too often, ConflictError when a checkpoint is another run's.
    """
    meta = checkpoints.load_newest(state.tensors(), state.check)
    if meta is not None:
        state.restore_meta(meta)
    call, meter = callbacks or Callbacks(), meter or Meter()
    call.resume(state)
    stream = open_stream(state.step) if state.images < settings.images else iter(())
    task, stop = task.on(engine.device), False
    with on_device(stream, engine.device) as batches:
        while state.images < settings.images and not stop:
            # Data: this rank's share of global batch number `step`.
            with meter.waiting():
                batch = next(batches)
            before = state.images
            state.images += settings.batch_size

            # Gradients, accumulated over micro-batches and averaged over ranks by the last of them.
            # For a model that draws its own dropout: by run, step and rank, hence the same after a resume.
            torch.manual_seed((state.seed * 1_000_003 + state.step * 8_191 + collectives.rank()) % (1 << 63))
            sums = _backward(state, engine, task, batch, settings)
            norm = nn.utils.clip_grad_norm_(list(state.params.values()), settings.clip_norm)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

            # One small reduction: everything that every rank must decide alike is decided on its result.
            totals = _totals(sums, norm, call.should_stop(), call.poll_due())
            stop = totals.stop
            leaving = totals.poll and call.preempted()
            loss = totals.loss_sum / settings.batch_size
            rate = _learning_rate(state.images, settings)
            if math.isfinite(loss) and math.isfinite(totals.norm) and totals.norm <= settings.guard_norm:
                for group in state.optimizer.param_groups:
                    group["lr"] = rate
                state.optimizer.step()
                state.ema.update(state.weights, state.images, settings.batch_size)
                state.skipped_in_a_row = 0
                window = state.window.get("sums", [0.0] * (1 + 2 * NUM_BINS))
                state.window["sums"] = [a + b for a, b in zip(window, totals.window, strict=True)]
            else:
                _skip(state, batch.source, loss, totals.norm, call.skip)
                if state.skipped_in_a_row >= settings.max_skipped_in_a_row:
                    _roll_back(state, checkpoints, loss, totals.norm, settings)
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            meter.step(settings.batch_size)
            call.after_step()

            # Reports, hooks and checkpoints happen when the count of images crosses a multiple, wherever it began.
            done = state.images >= settings.images
            if done or _crossed(before, state.images, settings.log_images):
                call.log(_record(state, batch.source, rate, totals.norm, meter))
            for hook in call.hooks:
                if done or _crossed(before, state.images, hook.every_images):
                    with meter.paused():
                        call.log({"step": state.step, "images": state.images, **hook.run(state)})
            if done or stop or leaving or _crossed(before, state.images, settings.checkpoint_images):
                with meter.paused():
                    checkpoints.save(state.tensors(), state.meta())
    checkpoints.wait()
    collectives.barrier()
    return "done" if state.images >= settings.images else "stopped"


def _backward(state: TrainState, engine: Engine, task: Task, batch: DeviceBatch, settings: Settings) -> Tensor:
    """Backward over this rank's share; float64 on the device: loss sum, bin sums, bin counts."""
    device = engine.device
    # The count of micro-batches depends on the largest share, so that ranks with uneven shares stay in step.
    largest_share = -(-settings.batch_size // collectives.world_size())
    num_micro = -(-largest_share // settings.micro_batch)
    sums = torch.zeros(1 + 2 * NUM_BINS, dtype=torch.float64, device=device)
    for i, rows in enumerate(torch.arange(len(batch.ids)).tensor_split(num_micro)):
        # A rank one sample short repeats its first one, with weight 0.
        part = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 1)
        counts = float(len(rows) > 0)
        labels = None if batch.labels is None else batch.labels[part]
        text = None if batch.text is None else widened_text(batch.text, part)
        sizes = None if batch.sizes is None else batch.sizes[part]
        with engine.without_sync(i < num_micro - 1):
            with torch.autocast(device.type, torch.bfloat16) if settings.precision == "bf16" else nullcontext():
                losses, t = task.training_losses(
                    engine.forward,
                    batch.latents[part].float(),
                    batch.ids[part],
                    labels,
                    batch.source.epoch,
                    text,
                    sizes,
                )
            # Ranks are averaged, samples of the global batch are meant: undo the one, do the other.
            scale = counts * collectives.world_size() / settings.batch_size
            (losses.sum() * scale).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            values = losses.detach().double() * counts
            bins = (t * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            sums[0] += values.sum()
            sums[1 : 1 + NUM_BINS].index_add_(0, bins, values)
            sums[1 + NUM_BINS :].index_add_(0, bins, torch.full_like(values, counts))
    return sums


@dataclass(frozen=True)
class Totals:
    """A step as all ranks know it: gradient norm; whether any stops or polls; loss sum, bin sums, bin counts."""

    norm: float
    stop: bool
    poll: bool
    window: list[float]

    @property
    def loss_sum(self) -> float:
        """Of the samples of the global batch."""
        return self.window[0]


def _totals(sums: Tensor, norm: Tensor, stop: bool, poll: bool) -> Totals:
    """One sum over ranks and one copy to the host: the only place where a step waits for its device."""
    flags = [sums.new_full((1,), float(flag)) for flag in (stop, poll)]
    reduced = collectives.total(torch.cat([*flags, sums]))
    # The norm is of the ranks' averaged gradient already.
    any_stop, any_poll, *window, whole = torch.cat([reduced, norm.double().reshape(1)]).cpu().tolist()
    return Totals(whole, any_stop > 0, any_poll > 0, window)


def _learning_rate(images: int, s: Settings) -> float:
    return learning_rate(
        images,
        peak=s.learning_rate,
        warmup_images=s.warmup_images,
        decay_images=s.decay_images,
        total_images=s.images,
        final_ratio=s.decay_final_ratio,
        shape=s.decay_shape,
    )


def _skip(state: TrainState, batch: BatchLike, loss: float, norm: float, on_skip: Log) -> None:
    """Leave weights and averages as they are, and say which samples were in the batch."""
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    names = collectives.gather_json([bytes(row.astype("<u8").tobytes()).hex() for row in batch.sample_ids])
    ids = [name for share in names for name in share]
    record = {"step": state.step, "images": state.images, "loss": loss, "grad_norm": norm, "sample_ids": ids}
    on_skip({**record, "dataset": batch.dataset})


def _roll_back(state: TrainState, checkpoints: CheckpointStore, loss: float, norm: float, settings: Settings) -> None:
    """Take the last checkpoint's weights, averages and optimiser and go on after the skipped batches.

    The same batches would end the same way, so neither the stream nor the count of images goes back. Gives up,
    with PipelineError, after too many times, or when there is no checkpoint.
    """
    checkpoints.wait()
    collectives.barrier()
    back = None
    if state.rollbacks < settings.max_rollbacks:
        # One taken between the skipped steps would hold the very weights that are to be given up.
        good = state.images - state.skipped_in_a_row * settings.batch_size
        back = checkpoints.load_newest(state.tensors(), state.check, not_after=good)
    if back is None:
        raise PipelineError(
            f"Training diverged: {state.skipped_in_a_row} steps in a row had a non-finite loss or a gradient norm "
            f"above {settings.guard_norm:g} (step {state.step}, loss {loss:g}, norm {norm:g}) after "
            f"{state.rollbacks} returns to a checkpoint",
            key="train.max_skipped_in_a_row",
            value=settings.max_skipped_in_a_row,
            rule=f"such steps are skipped on all ranks; the run goes back at most {settings.max_rollbacks} times "
            "(train.max_rollbacks), as far as it has checkpoints",
            next_step="lower train.learning_rate, or look at the samples named in quarantine/",
        )
    state.rollbacks += 1
    state.skipped_in_a_row = 0
    _log.warning(
        "step %d: weights are again those of %d images; training goes on after the skipped batches",
        state.step,
        int(back["images"]),
    )


def _record(state: TrainState, batch: BatchLike, rate: float, norm: float, meter: Meter) -> dict[str, Any]:
    """The figures since the last record; the open window is part of the checkpoint, so a resume leaves no seam.

    "epoch" is that of the first dataset and "epoch_mix<n>" that of `data.mix[n]`: of several, the last batch's alone.
    """
    total, *rest = state.window.pop("sums", [0.0] * (1 + 2 * NUM_BINS))
    sums, counts = rest[:NUM_BINS], rest[NUM_BINS:]
    epoch = f"epoch_mix{batch.dataset - 1}" if batch.dataset else "epoch"
    record: dict[str, Any] = {"step": state.step, "images": state.images, epoch: batch.epoch}
    if sum(counts):
        record["loss"] = total / sum(counts)
    for i, (value, count) in enumerate(zip(sums, counts, strict=True)):
        if count:
            record[f"loss_t{i}"] = value / count
    record |= {"learning_rate": rate, "grad_norm": norm, "skipped_steps": state.skipped_steps}
    record["rollbacks"] = state.rollbacks
    return record | meter.figures()


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


# -- Floating-point operations of a step, counted by torch itself ----------------------------------------------


def forward_flops(
    model: ModelConfig,
    *,
    latent_channels: int,
    height: int,
    width: int,
    num_classes: int | None,
    text_dim: int | None,
    text_length: int = 77,
) -> int:
    """FLOPs of one forward pass on one latent [latent_channels, height, width]."""
    from pipeline.model.load import build_model  # it reads configurations; who counts a module has none

    more = {"pooled_BP": (model.pooled_dim,)} if model.pooled_dim else {}
    return module_flops(
        lambda: build_model(model, latent_channels=latent_channels, num_classes=num_classes, text_dim=text_dim),
        shape=(latent_channels, height, width),
        labelled=num_classes is not None,
        text_shape=None if text_dim is None else (text_length, text_dim),
        more=more | ({"sizes_B6": (6,)} if model.micro_conditions else {}),
    )


def module_flops(
    make: Callable[[], nn.Module],
    *,
    shape: tuple[int, int, int],
    labelled: bool,
    text_shape: tuple[int, int] | None = None,
    more: Mapping[str, tuple[int, ...]] | None = None,
) -> int:
    """The same of the module that `make` returns, on one latent of `shape` and text embeddings of `text_shape`.

    more: the shapes of what else it is given, by name.
    """
    with torch.device("meta"), torch.no_grad():
        module = make()
        text = None if text_shape is None else torch.empty(1, *text_shape)
        labels = torch.zeros(1, dtype=torch.int64) if labelled else None
        with FlopCounterMode(display=False) as counter:
            others = {name: torch.empty(1, *size) for name, size in (more or {}).items()}
            module(torch.empty(1, *shape), torch.empty(1), labels, text, **others)
    return int(counter.get_total_flops())


def train_flops(forward: int) -> int:
    """FLOPs of forward and backward together."""
    return 3 * forward
