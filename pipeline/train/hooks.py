"""What a run does now and then between steps: fixed questions, pictures of fixed seeds, their distance to data."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.codec import load_codec
from pipeline.dataflow.device_faults import out_of_memory
from pipeline.diffusion.config import SamplerConfig
from pipeline.diffusion.rng import id_from_text, keyed_normal, keyed_uniform
from pipeline.diffusion.samplers import Drawer, Embedding, Solving, Texts, padded
from pipeline.features import ExtractorConfig
from pipeline.features.networks import load_extractor
from pipeline.features.statistics import FeatureStats, frechet, kid
from pipeline.media import class_text, contact_sheet, encode_image
from pipeline.storage.root import Root
from pipeline.train import collectives
from pipeline.train.checks import Facts, trained_combinations
from pipeline.train.config import TrainJobConfig
from pipeline.train.export import sampling_shift
from pipeline.train.inputs import Served, distance_chunks, grid_prompts, validation_chunks
from pipeline.train.loop import Hook
from pipeline.train.state import TrainState
from pipeline.train.task import Chunk, Forward, Task, Text

# -- Validation loss on fixed samples, stratified timesteps and fixed noise: the same question at every visit --
#
# Sample i is asked at t = (j + u_i) / T for j < T, with u_i and the noise keyed by its id, so two visits differ by
# the weights alone; chunks of fixed shape are dealt to ranks, so the answer does not depend on the world size.


_CPU = torch.device("cpu")


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

    prompts: the prompt of each picture, and their embeddings; None for a model that reads no text. names: of the
    classes, as far as they are known. factor, distilled: see `Drawer`.
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
    names: tuple[str, ...] = ()
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
        task, draw = self.task, _drawer(self, state, "grid")
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
        captions = [[] if labels is None else [class_text(labels[i], self.names)] for i in range(self.images)]
        if self.prompts is not None:
            for caption, prompt in zip(captions, self.prompts[0], strict=True):
                caption.append(prompt[:_CAPTION])
        return contact_sheet([encode_image(p, {}) for p in pixels], [", ".join(caption) for caption in captions])


def _drawer(by: SampleGrid | FeatureDistance, state: TrainState, purpose: str) -> Drawer:
    task = by.task
    return Drawer(
        state.model,
        objective=task.objective,
        mean_C=task.mean,
        std_C=task.std,
        num_classes=task.num_classes,
        seed=task.seed,
        purpose=purpose,
        device=by.device,
        factor=by.factor,
        distilled=by.distilled,
        dtype=torch.bfloat16 if by.precision == "bf16" else torch.float32,
    )


def _embeddings(text: Text) -> list[Embedding]:
    values, mask, *pooled = (part.numpy() for part in text)
    return [Embedding(values[at], mask[at], pooled[0][at] if pooled else None) for at in range(len(values))]


# -- How far draws are from the data, in the space of a feature network ----------------------------------------


@dataclass
class FeatureDistance:
    """Frechet and kernel distance, see `features.statistics`, of draws to latents of the data, both decoded.

    What is drawn has the labels, texts and sizes of these latents and is keyed by their ids: visits differ by the
    weights alone. Every rank holds all chunks and draws its share; rank 0 computes, which takes a minute at 2,048
    features. drawing of `ema`: see `SampleGrid`.
    """

    task: Task
    ema: str
    chunks: Sequence[Chunk]
    solving: Solving
    codec: dict[str, Any]
    extractor: ExtractorConfig
    factor: int | None = None
    distilled: bool = False
    device: torch.device = _CPU
    precision: str = "fp32"
    _real: Tensor | None = field(default=None, init=False)

    def run(self, state: TrainState) -> dict[str, float]:
        """{"distance/frechet", "distance/kid"}, and the ends of their 95 % intervals under _low and _high."""
        codec = load_codec(**self.codec, device=str(self.device), dtype="auto")
        look, draw = load_extractor(self.extractor, device=str(self.device)), _drawer(self, state, "distance")
        assert look is not None  # the configuration names no classifier

        def features(raw: Tensor) -> Tensor:
            at_once = max(1, _DECODED_PIXELS // (raw.shape[2] * raw.shape[3] * codec.info.factor**2))
            pixels = torch.cat([codec.decode(part.to(self.device)).cpu() for part in torch.split(raw, at_once)])
            return torch.cat([torch.from_numpy(look(part.numpy())[0]) for part in torch.split(pixels, at_once)])

        def drawn(chunk: Chunk) -> Tensor:
            count, texts = len(chunk.ids), None
            if chunk.text is not None and self.task.empty_text is not None:
                (away,) = _embeddings(self.task.empty_text)
                texts = [(prompt, away) for prompt in _embeddings(chunk.text)]
            given = [None] * count if chunk.labels is None else chunk.labels.tolist()
            labels = [None if label is None or label < 0 else int(label) for label in given]
            shape = (len(self.task.mean), *chunk.latents.shape[2:])
            return features(draw([row.tobytes() for row in chunk.ids.numpy()], labels, texts, shape, self.solving))

        if self._real is None:  # of a stored posterior, its mean
            self._real = self._all(lambda chunk: features(chunk.latents[:, : len(self.task.mean)]))
        was_training = state.model.training
        state.model.eval()
        with state.swapped(self.ema):
            found = self._all(drawn)
        state.model.train(was_training)
        if collectives.rank() != 0:
            return {}
        keys = np.concatenate([chunk.ids[:, 0].numpy() for chunk in self.chunks]).view(np.uint64)
        sets = [FeatureStats.of(keys, part.numpy(), len(keys)) for part in (self._real, found)]
        figures: dict[str, float] = {}
        for name, estimate in (("frechet", frechet(*sets)), ("kid", kid(*sets))):
            told = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
            figures |= {f"distance/{name}{end}": value for end, value in told.items() if math.isfinite(value)}
        return figures

    def _all(self, features: Callable[[Chunk], Tensor]) -> Tensor:
        """The features of all chunks, float32 [n, d], the same on every rank; each asks for its share."""
        count, ranks = len(self.chunks), collectives.world_size()
        ends = np.cumsum([len(chunk.ids) for chunk in self.chunks]).tolist()
        whole: Tensor | None = None
        # Under FSDP every forward is a collective: each rank makes as many, the surplus ones are thrown away.
        for first in range(0, count, ranks):
            index = first + collectives.rank()
            part = features(self.chunks[min(index, count - 1)])
            whole = torch.zeros(ends[-1], part.shape[1]) if whole is None else whole
            if index < count:
                whole[ends[index] - len(part) : ends[index]] = part
        assert whole is not None
        return collectives.total(whole)


# -- What of these a configuration asks for --------------------------------------------------------------------


def make_hooks(
    config: TrainJobConfig,
    served: Sequence[Served],
    facts: Facts,
    task: Task,
    state: TrainState,
    device: torch.device,
    show: Callable[[TrainState, bytes], None],
) -> list[Hook]:
    """What every rank does between steps; `show` gets the pictures of grids."""
    hooks, root, precision = [], Root(config.output.uri), config.train.precision
    if config.validation.images:
        question = Validation(
            task.on(device),
            state.model,
            validation_chunks(config, served, root),
            num_timesteps=config.validation.timesteps,
            ema=[t.name for t in state.ema.tracks],
            device=device,
            precision=precision,
        )
        hooks.append(Hook(config.validation.every_images, question.run))
    drawing: dict[str, Any] = {
        "task": task,
        "codec": facts.codec,
        "factor": facts.factor if config.model.micro_conditions else None,
        "distilled": config.model.distilled,
        "device": device,
        "precision": precision,
    }

    if config.grid.every_images is not None:
        first, zero_empty = served[0], facts.zero_empty_text
        grid = SampleGrid(
            ema=config.train.ema[0].name,
            images=config.grid.images,
            shape=(facts.latent_channels, *facts.latent_size),
            solving=_solving(config, facts, config.grid.sampler),
            show=show,
            prompts=None if first.text is None else grid_prompts(config, first, zero_empty=zero_empty),
            names=first.latents.class_names,
            collective=config.train.strategy != "ddp",
            **drawing,
        )
        hooks.append(Hook(config.grid.every_images, grid.run))
    if config.distance.every_images is not None:
        assert config.distance.extractor is not None  # the configuration made sure
        distance = FeatureDistance(
            ema=config.train.ema[0].name,
            chunks=distance_chunks(config, served[0], root),
            solving=_solving(config, facts, config.distance.sampler),
            extractor=config.distance.extractor,
            **drawing,
        )
        hooks.append(Hook(config.distance.every_images, distance.run))
    return hooks


def _solving(config: TrainJobConfig, facts: Facts, sampler: SamplerConfig) -> Solving:
    """As a sampler is configured; without guidance where the model is never trained without conditions."""
    conditional = facts.num_classes is not None or bool(facts.texts)
    guided = conditional and "none" in trained_combinations(config, facts)
    return Solving(
        sampler=sampler.name,
        steps=sampler.steps,
        guidance=sampler.guidance if guided else 1.0,
        guidance_interval=sampler.guidance_interval,
        shift=sampling_shift(config, facts) if sampler.shift is None else sampler.shift,
    )


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
    # acc_events: of one cycle nothing is lost either way, but torch 2.11 warns of it, which may be an error.
    with torch.profiler.profile(schedule=schedule, on_trace_ready=ready, acc_events=True) as profiler:
        yield profiler.step
