"""What a rank reads: the stream, the text, and the fixed questions and prompts that a run asks again and again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.diffusion.objectives import Objective, TimestepDensity
from pipeline.diffusion.rng import ids_from_words
from pipeline.errors import ConfigError, argument_keys
from pipeline.model.config import PublishedConfig
from pipeline.storage.root import Root
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins
from pipeline.stream.data import Captions
from pipeline.stream.loader import LatentStream
from pipeline.stream.mixture import (
    BLOCK,
    FOREVER,
    MixtureStream,
    Part,
    apportion,
    naming,
    open_mixture,
    shares_of,
)
from pipeline.stream.order import PARTS
from pipeline.text.dataset import ArrangedText, TextEmbeddings
from pipeline.train import collectives
from pipeline.train.checks import CACHE, STREAM_KEYS, Facts, steps_of
from pipeline.train.config import TrainJobConfig
from pipeline.train.task import BatchLike, Chunk, Task, Text, micro_conditions, stored_values, text_tensors


# Where a stream's arguments come from.
@dataclass(frozen=True)
class Served:
    """A dataset of the run; weight: as given; share: of the batches, 1 when it is the only one."""

    latents: LatentDataset
    weight: float = 1.0
    share: float = 1.0
    text: TextEmbeddings | ArrangedText | None = None
    where: str | None = None
    steps: tuple[int, int] = (0, FOREVER)
    captions: tuple[str, ...] = ("caption",)

    @property
    def name(self) -> str | None:
        """What errors call it; None when there is no other it could be taken for."""
        return None if self.share == 1.0 else self.latents.uri


def open_served(config: TrainJobConfig, pins: Pins | None = None, *, zero_empty: bool = False) -> tuple[Served, ...]:
    """The datasets of the run, the first one first, with the embeddings to learn from.

    pins: where the states are kept that it began with; without them, what is visible now. zero_empty: see
    `ArrangedText`.
    """
    parts = config.data.parts
    weights = [part.weight for part in parts.values()]
    shares = (shares_of(weights, len(weights)) / BLOCK).tolist()
    served = []
    for (key, part), share in zip(parts.items(), shares, strict=True):
        text = None
        if part.text:
            memory = max(1, int(share * config.data.text_cache_bytes / len(part.text)))
            text = _open_text(config, part.text, f"{key}.text", memory, pins, zero_empty=zero_empty)
        latents = LatentDataset.open(part.uri, f"{key}.uri", pins)
        steps = steps_of(part, config.train.batch_size)
        served.append(Served(latents, part.weight, share, text, part.where, steps, part.captions))
    return tuple(served)


def _open_text(
    config: TrainJobConfig,
    uris: Sequence[str],
    key: str,
    memory: int,
    pins: Pins | None,
    *,
    zero_empty: bool,
) -> TextEmbeddings | ArrangedText:
    texts = [TextEmbeddings.open(uri, cache_bytes=memory, key=key, pins=pins) for uri in uris]
    if not isinstance(config.model, PublishedConfig):
        return texts[0]
    return ArrangedText(texts, config.model.arrangement, config.model.text_dim or 0, zero_empty=zero_empty)


def embedded(text: TextEmbeddings | ArrangedText, captions: list[str | None]) -> Text:
    """The text of some captions as tensors: float32 [n, l, d], bool [n, l] and, where it has them, pooled [n, p]."""
    return text_tensors(text.lookup_stored(captions))


def make_task(config: TrainJobConfig, served: Sequence[Served], facts: Facts) -> Task:
    """The learning problem of a configuration; latents are normalised by the statistics of what is served."""
    mean, std = latent_scale(served, facts.latent_channels)
    if facts.scale is not None:
        mean, std = (torch.tensor(facts.scale[name], dtype=torch.float32) for name in ("mean", "std"))
    text = served[0].text
    return Task(
        objective=Objective(**config.objective.model_dump()),
        density=TimestepDensity(**config.timesteps.model_dump()),
        mean=mean,
        std=std,
        num_classes=facts.num_classes,
        label_dropout=config.train.label_dropout,
        seed=config.train.seed,
        moments=facts.moments,
        text_dropout=config.train.text_dropout,
        joint_dropout=config.train.joint_dropout,
        empty_text=None if text is None else embedded(text, [None]),
    )


def latent_scale(served: Sequence[Served], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that latents of so many channels are normalised by, float32 [c] each.

    A channel that never varies is shifted, not blown up. Of stored posteriors, the means' spread is taken.
    """
    mean, std = (torch.from_numpy(values[:channels]).float() for values in pooled_statistics(served))
    return mean, std.clamp_min(1e-6)


def pooled_statistics(served: Sequence[Served]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every stored channel as served, float64 [c] each.

    With shares p_i: mean = sum p_i mean_i, variance = sum p_i (std_i^2 + (mean_i - mean)^2).
    """
    shares = np.array([part.share for part in served])[:, None]
    means = np.stack([part.latents.channel_mean for part in served])
    stds = np.stack([part.latents.channel_std for part in served])
    mean = (shares * means).sum(axis=0)
    return mean, np.sqrt((shares * (stds**2 + (means - mean) ** 2)).sum(axis=0))


def open_stream(
    config: TrainJobConfig, served: Sequence[Served], root: Root, order: str = PARTS
) -> LatentStream | MixtureStream:
    """This rank's share of the training rows, in the order of this rule."""
    settings: dict[str, Any] = {
        "seed": config.train.seed,
        "batch_size": config.train.batch_size,
        "rank": collectives.rank(),
        "world_size": collectives.world_size(),
        "captions": False,
        "sizes": config.model.micro_conditions,
        "cache": root.child(CACHE),
        "rule": order,
        **config.stream.model_dump(),
    }
    with argument_keys(STREAM_KEYS):
        if len(served) == 1:
            only = served[0]
            settings |= {"text": only.text, "where": only.where, "captions_from": only.captions}
            return LatentStream(only.latents, **settings)
        parts = [
            Part(part.latents.uri, part.latents, part.weight, part.text, part.where, part.steps, part.captions)
            for part in served
        ]
        return open_mixture(parts, **settings)


def batches_from(stream: LatentStream | MixtureStream, step: int) -> Iterator[BatchLike]:
    """The stream's batches from a step on."""
    stream.start_step = step
    return iter(stream)


def validation_chunks(config: TrainJobConfig, served: Sequence[Served], root: Root) -> list[Chunk]:
    """Held-out samples, of each dataset as many chunks as its share: the same on every rank, at every start."""
    wanted = math.ceil(config.validation.images / config.validation.chunk)
    counts = apportion([part.share for part in served], wanted).tolist()
    return [
        chunk for part, count in zip(served, counts, strict=True) for chunk in _held_out(config, part, root, count)
    ]


def distance_chunks(config: TrainJobConfig, first: Served, root: Root) -> list[Chunk]:
    """Samples of the first dataset that draws are compared with: of what is held out, where anything is."""
    count = math.ceil(config.distance.images / config.validation.chunk)
    return _held_out(config, first, root, count, "holdout" if config.stream.holdout else "train")


def _held_out(config: TrainJobConfig, part: Served, root: Root, count: int, split: str = "holdout") -> list[Chunk]:
    """The first chunks of a dataset's held-out samples in an order of their own; fewer when it has no more."""
    if not count:
        return []
    # Only `holdout` decides which rows these are; one lane, so that a few rows fill a chunk.
    settings = config.stream.model_dump() | {"lanes": 1, "batch_size": config.validation.chunk, "split": split}
    settings |= {
        "captions": False,
        "sizes": config.model.micro_conditions,
        "text": part.text,
        "cache": root.child(CACHE),
    }
    settings |= {"where": part.where, "captions_from": part.captions}
    # What a stream calls a batch is a chunk of the validation here, and errors say so.
    keys, chunks = argument_keys({**STREAM_KEYS, "batch_size": "validation.chunk"}), []
    try:
        with naming(part.name), keys, LatentStream(part.latents, seed=0, **settings) as stream:
            first_epoch = takewhile(lambda batch: batch.epoch == 0, stream)
            for batch in islice(first_epoch, count):
                labels = None if batch.labels is None else torch.from_numpy(batch.labels)
                text = None if batch.text is None else text_tensors(batch.text)
                ids, sizes = ids_from_words(batch.sample_ids), micro_conditions(batch)
                chunks.append(Chunk(stored_values(batch.latents).float(), ids, labels, text, sizes))
    except ConfigError as error:
        if error.key != "validation.chunk":
            raise
        raise error.but(
            what="the held-out rows do not fill one chunk of the validation",
            next_step=f"use a smaller chunk, or hold out more than stream.holdout={config.stream.holdout}",
        ) from None
    return chunks


def grid_prompts(config: TrainJobConfig, first: Served, *, zero_empty: bool) -> tuple[tuple[str, ...], Text]:
    """What grids show, with its text: `grid.prompts`, or the first distinct captions of the data, in turns."""
    dataset, text, count = first.latents, first.text, config.grid.images
    assert text is not None
    distinct = list(config.grid.prompts)
    if distinct:
        # As it is now: prompts may be embedded after the run began, and what one means does not change.
        text = _open_text(config, config.data.text, "data.text", 1, None, zero_empty=zero_empty)
    names = Captions(first.captions)
    for group in range(0 if distinct else len(dataset.row_groups)):
        texts = names.of(dataset.read(group, names.columns))
        texts = texts.flatten() if pa.types.is_list(texts.type) else texts
        distinct = list(dict.fromkeys([*distinct, *texts.drop_null().to_pylist()]))
        if len(distinct) >= count:
            break
    distinct = distinct[:count] or [""]
    prompts = [distinct[at % len(distinct)] for at in range(count)]
    return tuple(prompts), embedded(text, list(prompts))
