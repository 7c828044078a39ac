"""What a rank reads: the stream, the text, and the fixed questions and prompts that a run asks again and again."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.rng import ids_from_words
from pipeline.diffusion.timesteps import TimestepDensity
from pipeline.storage import Root
from pipeline.store.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.text.dataset import TextEmbeddings
from pipeline.train import world
from pipeline.train.config import TrainJobConfig
from pipeline.train.handshake import Facts
from pipeline.train.loop import BatchLike
from pipeline.train.task import Task, Text, on_device
from pipeline.train.validate import Chunk

CACHE = "cache"  # below output.uri: what was counted once about the dataset
_CPU = torch.device("cpu")


def open_text(config: TrainJobConfig) -> TextEmbeddings | None:
    """The embeddings to learn from; None where the run reads no text."""
    if config.data.text_uri is None:
        return None
    return TextEmbeddings.open(config.data.text_uri, cache_bytes=config.data.text_cache_bytes, key="data.text_uri")


def embedded(text: TextEmbeddings, captions: list[str | None]) -> Text:
    """The embeddings of some captions as tensors: float32 [n, l, d] and bool [n, l]."""
    values, mask = text.lookup_stored(captions)
    return on_device(values, _CPU), torch.from_numpy(mask)


def make_task(
    config: TrainJobConfig, dataset: LatentDataset, facts: Facts, text: TextEmbeddings | None = None
) -> Task:
    """The learning problem of a configuration; latents are normalised by the dataset's own statistics."""
    c = facts.latent_channels
    mean = torch.from_numpy(dataset.channel_mean[:c]).float()
    # A channel that never varies is shifted, not blown up. Of stored posteriors, the means' spread is taken.
    std = torch.from_numpy(dataset.channel_std[:c]).float().clamp_min(1e-6)
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
        empty_text=None if text is None else embedded(text, [None]),
    )


def open_stream(
    config: TrainJobConfig, dataset: LatentDataset, root: Root, text: TextEmbeddings | None = None
) -> LatentStream:
    """This rank's share of the training rows."""
    return LatentStream(
        dataset,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        rank=world.rank(),
        world_size=world.world_size(),
        captions=False,
        sizes=False,
        text=text,
        cache=root.child(CACHE),
        **config.stream.model_dump(),
    )


def batches_from(stream: LatentStream, step: int) -> Iterator[BatchLike]:
    """The stream's batches from a step on."""
    stream.start_step = step
    return iter(stream)


def validation_chunks(
    config: TrainJobConfig, dataset: LatentDataset, root: Root, text: TextEmbeddings | None = None
) -> list[Chunk]:
    """The first held-out samples in an order of their own: the same on every rank, at every start."""
    v, chunks, wanted = config.validation, list[Chunk](), config.validation.images
    # Only `holdout` decides which rows these are; one lane, so that a few rows fill a chunk.
    settings = config.stream.model_dump() | {"lanes": 1}
    stream = LatentStream(
        dataset,
        seed=0,
        batch_size=v.chunk,
        split="holdout",
        captions=False,
        sizes=False,
        text=text,
        cache=root.child(CACHE),
        **settings,
    )
    with stream:
        for batch in stream:
            if len(chunks) * v.chunk >= wanted or batch.epoch > 0:
                break
            labels = None if batch.labels is None else torch.from_numpy(batch.labels)
            asked = None
            if batch.text is not None:
                asked = (on_device(batch.text[0], _CPU), torch.from_numpy(batch.text[1]))
            latents = on_device(batch.latents, _CPU)
            chunks.append(Chunk(latents, ids_from_words(batch.sample_ids), labels, asked))
    return chunks


def grid_prompts(dataset: LatentDataset, text: TextEmbeddings, count: int) -> tuple[tuple[str, ...], Text]:
    """The first distinct captions of the dataset, taking turns where there are fewer than `count`."""
    found: dict[str, None] = {}
    for group in range(len(dataset.row_groups)):
        found |= dict.fromkeys(c for c in dataset.read(group, ["caption"])["caption"].to_pylist() if c is not None)
        if len(found) >= count:
            break
    distinct = list(found)[:count] or [""]
    prompts = [distinct[at % len(distinct)] for at in range(count)]
    return tuple(prompts), embedded(text, list(prompts))
