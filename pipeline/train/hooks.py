"""What a run does now and then between steps: validation on fixed questions, and pictures from fixed seeds."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.codec import load_codec
from pipeline.dataflow.device_faults import out_of_memory
from pipeline.diffusion.rng import id_from_text, keyed_normal, keyed_uniform
from pipeline.diffusion.samplers import Drawer, Embedding, Solving, Texts, padded
from pipeline.media import contact_sheet, encode_image
from pipeline.train import collectives
from pipeline.train.state import TrainState
from pipeline.train.task import Forward, Task, Text

# -- Validation loss on fixed samples, stratified timesteps and fixed noise: the same question at every visit --
#
# Sample i is asked at t = (j + u_i) / T for j < T, with u_i and the noise keyed by its id, so two visits differ by
# the weights alone; chunks of fixed shape are dealt to ranks, so the answer does not depend on the world size.


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Chunk:
    """Samples of one latent shape: raw latents [n, c, h, w], ids int64 [n, 2], labels [n] or None, text or None."""

    latents: Tensor
    ids: Tensor
    labels: Tensor | None
    text: Text | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Validation:
    """The fixed question; every rank holds all chunks and answers its share. ema: track names asked besides raw."""

    task: Task
    forward: Forward
    chunks: Sequence[Chunk]
    num_timesteps: int
    ema: Sequence[str] = ()
    device: torch.device = _CPU
    precision: str = "fp32"

    @torch.no_grad()
    def run(self, state: TrainState) -> dict[str, float]:
        """{"val/loss": mean, "val/loss_t<j>": mean of stratum j, and the same under "val/<track>/"}."""
        out: dict[str, float] = {}
        was_training = state.model.training
        state.model.eval()
        for name in (None, *self.ema):
            prefix = "val" if name is None else f"val/{name}"
            with state.swapped(name):
                by_stratum = self._losses().mean(dim=0)
            out[f"{prefix}/loss"] = float(by_stratum.mean())
            out |= {f"{prefix}/loss_t{j}": float(v) for j, v in enumerate(by_stratum)}
        state.model.train(was_training)
        return out

    def _losses(self) -> Tensor:
        """Loss of every sample at every stratum, float64 [samples, T], the same on every rank."""
        task, ranks, rank = self.task, collectives.world_size(), collectives.rank()
        count = len(self.chunks)
        starts = [0]
        for chunk in self.chunks:
            starts.append(starts[-1] + len(chunk.ids))
        losses = torch.zeros(starts[-1], self.num_timesteps, dtype=torch.float64)
        # Under FSDP every forward is a collective: each rank makes as many, the surplus ones are thrown away.
        for first in range(0, count, ranks):
            index = first + rank
            chunk = self.chunks[min(index, count - 1)]
            ids = chunk.ids.to(self.device)
            x0 = task.clean(chunk.latents.to(self.device), ids, 0)
            u = keyed_uniform(task.seed, ids, purpose="validate/timestep")
            labels = None if chunk.labels is None or task.num_classes is None else chunk.labels.to(self.device)
            text = None if chunk.text is None else tuple(part.to(self.device) for part in chunk.text)
            sizes = None if chunk.sizes is None else chunk.sizes.to(self.device)
            for j in range(self.num_timesteps):
                t = (j + u) / self.num_timesteps
                noise = keyed_normal(task.seed, ids, purpose="validate/noise", counter=j, shape=x0.shape[1:])
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    value = task.losses(self.forward, x0, noise, t, labels, text, sizes)
                if index < count:
                    losses[starts[index] : starts[index + 1], j] = value.double().cpu()
        return collectives.total(losses)


# -- Pictures while training: the same seeds and classes at every visit, drawn from an average of the weights --


_CHUNK = 16
_DECODED_PIXELS = 1 << 20  # at a time: weights, optimiser and averages leave little room on the device
_CAPTION = 24  # letters shown of a prompt

_log = logging.getLogger(__name__)
_CPU_GRID = torch.device("cpu")


@dataclass(frozen=True)
class SampleGrid:
    """How a grid is drawn. shape: (c, h, w) of a latent.

    prompts: the prompt of each picture, and their embeddings; None for a model that reads no text. factor, distilled:
    see `Drawer`.
    collective: every rank draws it (sharded models need that); otherwise rank 0 alone. precision: that of training.
    `show` gets the PNG bytes on rank 0.
    """

    task: Task
    ema: str
    images: int
    shape: tuple[int, int, int]
    solving: Solving
    codec: dict[str, Any]
    show: Callable[[TrainState, bytes], None]
    collective: bool = False
    prompts: tuple[tuple[str, ...], Text] | None = None
    factor: int | None = None
    distilled: bool = False
    device: torch.device = _CPU_GRID
    precision: str = "fp32"

    def run(self, state: TrainState) -> dict[str, float]:
        """Draw, decode on rank 0, show; no figures."""
        if collectives.rank() != 0 and not self.collective:
            return {}
        was_training = state.model.training
        state.model.eval()
        with state.swapped(self.ema):
            latents = self._latents(state)
        state.model.train(was_training)
        if collectives.rank() == 0:
            try:
                sheet = self._sheet(latents)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                _log.warning("no pictures at step %d, memory ran out: %s", state.step, " ".join(str(error).split()))
            else:
                self.show(state, sheet)
        return {}

    def classes(self) -> list[int] | None:
        """The class of each picture: they take turns."""
        return None if self.task.num_classes is None else [i % self.task.num_classes for i in range(self.images)]

    def _latents(self, state: TrainState) -> Tensor:
        task = self.task
        draw = Drawer(
            state.model,
            objective=task.objective,
            mean_C=task.mean,
            std_C=task.std,
            num_classes=task.num_classes,
            seed=task.seed,
            purpose="grid",
            device=self.device,
            factor=self.factor,
            distilled=self.distilled,
            dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32,
        )
        ids = [id_from_text(f"grid {i}") for i in range(self.images)]
        labels: Sequence[int | None] = self.classes() or [None] * self.images
        texts: Texts | None = None
        if self.prompts is not None and task.empty_text is not None:
            (away,) = _embeddings(task.empty_text)  # the empty prompt, which guidance leads away from
            texts = [(prompt, away) for prompt in _embeddings(self.prompts[1])]
        parts = []
        for rows, num_real in padded(np.arange(self.images), min(self.images, _CHUNK)):
            drawn = draw(
                [ids[i] for i in rows],
                [labels[i] for i in rows],
                None if texts is None else [texts[i] for i in rows],
                self.shape,
                self.solving,
            )
            parts.append(drawn[:num_real])
        return torch.cat(parts)

    def _sheet(self, latents: Tensor) -> bytes:
        codec = load_codec(**self.codec, device=str(self.device), dtype="auto")
        height, width = (side * codec.info.factor for side in self.shape[1:])
        chunk = max(1, min(_CHUNK, _DECODED_PIXELS // (height * width)))
        pixels = torch.cat([codec.decode(latents[i : i + chunk]).cpu() for i in range(0, self.images, chunk)]).numpy()
        labels = self.classes()
        captions = [[] if labels is None else [f"class {labels[i]}"] for i in range(self.images)]
        if self.prompts is not None:
            for caption, prompt in zip(captions, self.prompts[0], strict=True):
                caption.append(prompt[:_CAPTION])
        return contact_sheet([encode_image(p, {}) for p in pixels], [", ".join(caption) for caption in captions])


def _embeddings(text: Text) -> list[Embedding]:
    values, mask, *pooled = (part.numpy() for part in text)
    return [Embedding(values[at], mask[at], pooled[0][at] if pooled else None) for at in range(len(values))]


# -- What the processor and the device do during a few steps ---------------------------------------------------


@contextmanager
def profiled(steps: int, keep: Callable[[bytes], None]) -> Iterator[Callable[[], object]]:
    """What is to be called after each step; two steps later so many are recorded, and `keep` gets the trace.

    The trace: Chrome's JSON, gzipped. Nothing is recorded for 0 steps.
    """
    if not steps:
        yield lambda: None
        return

    def ready(profiler: torch.profiler.profile) -> None:
        with tempfile.TemporaryDirectory(prefix="latentloom-profile-") as scratch:
            file = Path(scratch, "trace.json.gz")
            profiler.export_chrome_trace(str(file))
            keep(file.read_bytes())

    # The first step allocates and compiles, the second one is slowed by the profiler's own start.
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=ready) as profiler:
        yield profiler.step
