"""A latent dataset in memory for the stream's tests, and the order read out row by row."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.store.read.pages import FixedRows, fixed_width_values
from pipeline.stream.order import Order


@dataclass(frozen=True)
class Group:
    index: int
    file: str
    group: int
    bucket: str
    num_rows: int
    size_bytes: int


class MemoryRows:
    """Row groups given as (bucket, rows); row r of group g has label 1000 g + r and everything else from it.

    `image_of`: the number of the image that a row is of, None where that is not known.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, int]],
        dtype: str = "float16",
        channels: int = 2,
        image_of: Callable[[int], int | None] = lambda number: number,
    ) -> None:
        self.latent_dtype, self.image_of = dtype, image_of
        self.shapes = {name: (channels, 2, 2 + at) for at, name in enumerate(sorted({b for b, _ in groups}))}
        self.tables = [self._table(at, bucket, rows) for at, (bucket, rows) in enumerate(groups)]
        self.row_groups = [
            Group(at, f"data/{at // 4}.parquet", at % 4, bucket, rows, 100 * rows + 1)
            for at, (bucket, rows) in enumerate(groups)
        ]
        self.digest = self.layout_digest = hashlib.sha256(repr((groups, dtype)).encode()).hexdigest()
        self.reads: list[tuple[int, tuple[str, ...]]] = []
        self._lock = threading.Lock()

    def _table(self, group: int, bucket: str, rows: int) -> pa.Table:
        shape = self.shapes[bucket]
        numbers = [1000 * group + row for row in range(rows)]
        latents = [self.stored(number, shape).tobytes() for number in numbers]
        columns = {
            "sample_id": pa.array([sample_id(number) for number in numbers], pa.binary(16)),
            "content_sha256": pa.array([content(self.image_of(number)) for number in numbers], pa.binary(32)),
            "latent": pa.array(latents, pa.large_binary()),
            "latent_shape": pa.array([list(shape)] * rows, pa.list_(pa.int32(), 3)),
            "label": pa.array(numbers, pa.int64()),
            "caption": pa.array([None if number % 3 else f"row {number}" for number in numbers], pa.string()),
        }
        for at, name in enumerate(SIZES):
            columns[name] = pa.array([number + at for number in numbers], pa.int32())
        return pa.table(columns)

    def values(self, number: int, shape: tuple[int, int, int]) -> np.ndarray:
        """What the stream must give for a row: float32, exact in both dtypes."""
        return ((np.arange(np.prod(shape)) + number % 97) % 64 / 8 - 4).astype(np.float32).reshape(shape)

    def stored(self, number: int, shape: tuple[int, int, int]) -> np.ndarray:
        values = self.values(number, shape)
        if self.latent_dtype == "float16":
            return values.astype(np.float16)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    def read(self, row_group: int, columns: Sequence[str], *, verify: bool = True) -> pa.Table:
        with self._lock:
            self.reads.append((row_group, tuple(columns)))
        return self.tables[row_group].select(list(columns))

    def read_fixed(self, row_group: int, column: str, *, verify: bool = True) -> FixedRows:
        return fixed_width_values(self.read(row_group, [column])[column])

    @property
    def latent_reads(self) -> list[int]:
        return [group for group, columns in self.reads if "latent" in columns]


SIZES = ("original_height", "original_width", "crop_top", "crop_left", "crop_height", "crop_width")


def sample_id(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def content(image: int | None) -> bytes | None:
    """The hash of an image's file."""
    return None if image is None else hashlib.sha256(str(image).encode()).digest()


def global_batch(order: Order, step: int) -> tuple[str, list[tuple[int, int]]]:
    """The bucket and the (row group, row) of every row of a global batch, worked out one row at a time."""
    epoch, before = order.served_before(step)
    bucket = int(order.schedule(epoch)[step % order.steps_per_epoch])
    rows: list[tuple[int, int]] = []
    for lane in range(order.spec.lanes):
        stretch: list[tuple[int, int]] = []
        for window in order.windows(epoch, bucket, lane):
            laid_out = [(p.row_group, row) for p in window.pieces for row in range(p.start, p.stop)]
            stretch += [laid_out[at] for at in window.permutation().tolist()]
        begin = int(before[bucket]) * order.slot
        rows += stretch[begin : begin + order.slot]
    return order.layout.buckets[bucket], rows
