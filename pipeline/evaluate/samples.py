"""Samples as the sample job left them: their rows in batches of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.media.contact import caption
from pipeline.media.images import decode_image
from pipeline.store.read.dataset import Dataset, read_outside

COLUMNS = (
    "sample_id",
    "image",
    "file",
    "label",
    "prompt",
    "seed",
    "steps",
    "guidance",
    "sampler",
    "run_seed",
)
SETTINGS = ("sampler", "steps", "guidance", "run_seed")


@dataclass(frozen=True)
class SampleBatch:
    """Samples of one size: ids (16 bytes each), pixels uint8 [n,h,w,3], labels asked for, encoded bytes,
    captions.

    `settings` are the distinct (name, value) pairs of how they were drawn.
    """

    ids: tuple[bytes, ...]
    images_NHWC: npt.NDArray[np.uint8]
    labels: tuple[int | None, ...]
    captions: tuple[str, ...]
    prompts: tuple[str | None, ...]
    encoded: tuple[bytes, ...]
    settings: frozenset[tuple[str, Any]]


def open_samples(uri: str) -> Dataset:
    """The sample job's output.

    InputError when there is none, it is of another kind, or nothing is in it yet.
    """
    samples: Dataset = Dataset.open_kind(uri, "images", "samples.uri")
    if samples.num_rows == 0:
        raise InputError(
            f"There are no images at {uri} yet",
            key="samples.uri",
            value=uri,
            next_step="run the sample job to its end first",
        )
    return samples


def sample_batches(samples: Dataset, batch_size: int) -> Iterator[SampleBatch]:
    """Every visible sample once.

    Memory is bounded by one row group of encoded images and one batch of pixels.
    """
    for group in samples.row_groups:
        rows = samples.read(group.index, COLUMNS)
        for start in range(0, rows.num_rows, batch_size):
            yield _batch(samples, rows.slice(start, batch_size).to_pylist())


def _batch(samples: Dataset, rows: Sequence[dict[str, Any]]) -> SampleBatch:
    encoded = [row["image"] or read_outside(samples.root, row["file"]) for row in rows]
    return SampleBatch(
        ids=tuple(row["sample_id"] for row in rows),
        images_NHWC=np.stack([decode_image(data) for data in encoded]),
        labels=tuple(row["label"] for row in rows),
        captions=tuple(caption(row) for row in rows),
        prompts=tuple(row["prompt"] for row in rows),
        encoded=tuple(encoded),
        settings=frozenset((key, row[key]) for row in rows for key in SETTINGS if row[key] is not None),
    )
