"""What goes into the stream (any store with row groups of latents) and what comes out of it (batches)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.stream.order import Layout


class RowGroupInfo(Protocol):
    """One row group as the dataset's manifest describes it; all its rows share one bucket."""

    @property
    def index(self) -> int: ...
    @property
    def file(self) -> str: ...
    @property
    def bucket(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...


class LatentRows(Protocol):
    """The part of a latent dataset the stream uses; `read` must be safe to call from several threads.

    digest: changes with the rows; layout_digest: changes with the rows or their places in row groups.
    """

    @property
    def digest(self) -> str: ...
    @property
    def layout_digest(self) -> str: ...
    @property
    def latent_dtype(self) -> str: ...
    @property
    def row_groups(self) -> Sequence[RowGroupInfo]: ...
    def read(self, row_group: int, columns: Sequence[str]) -> pa.Table: ...


@dataclass(frozen=True)
class Batch:
    """One rank's share of the global batch `step`; all of one bucket.

    latents: float32 [b, c, h, w], raw (nothing scaled or shifted); sample_ids: uint64 [b, 2], the 16 bytes
    of each id as two little-endian words; labels: int64 [b], -1 where a row has none; captions: "" where a
    row has none; both None when no row of the share has one. sizes: int32 [b, 6], in original pixels:
    height, width, crop top, left, height, width. dataset: which one of a mixture.
    """

    step: int
    epoch: int
    bucket: str
    latents: NDArray[np.float32]
    sample_ids: NDArray[np.uint64]
    labels: NDArray[np.int64] | None
    captions: list[str] | None
    sizes: NDArray[np.int32]
    dataset: int = 0


def layout_of(dataset: LatentRows, split_rows: NDArray[np.int64] | None = None) -> Layout:
    """The dataset's row groups as arrays; `split_rows` replaces the row counts when a split is served."""
    groups = dataset.row_groups
    names = sorted({group.bucket for group in groups})
    number = {name: at for at, name in enumerate(names)}
    count = len(groups)
    rows = split_rows
    if rows is None:
        rows = np.fromiter((group.num_rows for group in groups), np.int64, count)
    return Layout(
        buckets=tuple(names),
        bucket_of=np.fromiter((number[group.bucket] for group in groups), np.int64, count),
        rows=rows,
        read_bytes=np.fromiter((max(1, group.size_bytes) for group in groups), np.int64, count),
    )
