"""Windows of a rank's lanes put together to batches, in the order's sequence of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import chain

import numpy as np

from pipeline.stream.columns import widen
from pipeline.stream.data import Batch
from pipeline.stream.order import Order, Window
from pipeline.stream.reader import SIZE_COLUMNS, Shape, WindowRows

# Prepared in one go, because small rows are too many to handle batch by batch: float32 bytes, and batches.
_CHUNK_BYTES = 4 << 20
_CHUNK_BATCHES = 32

Submit = Callable[[Window], "Future[WindowRows]"]


def batches(order: Order, lanes: range, start_step: int, dtype: str, submit: Submit) -> Iterator[Batch]:
    """Batches from `start_step` on, without end, made of the given lanes' shares."""
    epoch, before = order.served_before(start_step)
    feeds = {}
    for bucket in np.flatnonzero(order.batches).tolist():
        row = int(before[bucket]) * order.slot
        cursors = [_LaneCursor(order, bucket, lane, epoch, row, submit) for lane in lanes]
        feeds[bucket] = _bucket_batches(order.layout.buckets[bucket], order.slot, cursors, dtype)
    for step, epoch, bucket in order.steps_from(start_step):
        chunk, index = next(feeds[bucket])
        yield chunk.batch(index, step, epoch)


def _bucket_batches(bucket: str, slot: int, cursors: list[_LaneCursor], dtype: str) -> Iterator[tuple[_Chunk, int]]:
    """A bucket's batches in order, without end, each as a chunk of them and an index into it."""
    count = 1
    while True:
        shape = cursors[0].peek().shape
        chunk = _Chunk(bucket, shape, count, len(cursors), slot)
        for at, cursor in enumerate(cursors):
            chunk.fill(at, cursor, dtype)
        for batch in range(count):
            yield chunk, batch
        # The first batch is not kept waiting for others, and a resume not made to read far ahead.
        batch_bytes = 4 * math.prod(shape) * slot * len(cursors)
        count = max(1, min(2 * count, _CHUNK_BATCHES, _CHUNK_BYTES // batch_bytes))


class _LaneCursor:
    """Walks one lane of one bucket through its windows, one window read ahead, epoch after epoch."""

    def __init__(self, order: Order, bucket: int, lane: int, epoch: int, row: int, submit: Submit) -> None:
        self._windows = _windows_from(order, bucket, lane, epoch, row)
        self._submit = submit
        self._rows: WindowRows | None = None
        window, self._at = next(self._windows)
        self._ahead = submit(window)

    def peek(self) -> WindowRows:
        """The window that holds the next row."""
        if self._rows is not None and self._at == len(self._rows.labels):
            self._rows, self._at = None, 0  # let go before the next but one is asked for
        if self._rows is None:
            self._rows = self._ahead.result()
            self._ahead = self._submit(next(self._windows)[0])
        return self._rows

    def take(self, count: int) -> Iterator[tuple[WindowRows, int, int]]:
        """The next `count` rows, as stretches of windows."""
        while count:
            rows = self.peek()
            stop = min(self._at + count, len(rows.labels))
            yield rows, self._at, stop
            del rows  # or it would outlive its window's turn
            count -= stop - self._at
            self._at = stop


def _windows_from(order: Order, bucket: int, lane: int, epoch: int, row: int) -> Iterator[tuple[Window, int]]:
    """Windows from a row of a lane on, without end, and how many of their rows come before that row."""
    windows = order.windows(epoch, bucket, lane)
    index = windows.find(row)
    if index == len(windows):  # the bucket's epoch is over; that of others may not be
        epoch, index, row = epoch + 1, 0, 0
        windows = order.windows(epoch, bucket, lane)
    while True:
        for at in range(index, len(windows)):
            window = windows[at]
            yield window, max(0, row - window.first_row)
            row = 0
        epoch, index = epoch + 1, 0
        windows = order.windows(epoch, bucket, lane)


class _Chunk:
    """Several consecutive batches of one bucket, filled lane by lane so that one numpy call does many rows.

    Arrays are [batches, lanes, slot rows, ...]; a batch is one contiguous slice of each.
    """

    def __init__(self, bucket: str, shape: Shape, count: int, lanes: int, slot: int) -> None:
        self._bucket, self._shape, self._count, self._slot = bucket, shape, count, slot
        self._wide = math.prod(shape)
        self._latents = np.empty((count, lanes, slot * self._wide), dtype=np.float32)
        self._sample_ids = np.empty((count, lanes, slot, 2), dtype=np.uint64)
        self._labels = np.empty((count, lanes, slot), dtype=np.int64)
        self._sizes = np.empty((count, lanes, slot, len(SIZE_COLUMNS)), dtype=np.int32)
        self._captions: list[list[str | None]] = []

    def fill(self, lane: int, cursor: _LaneCursor, dtype: str) -> None:
        """Take every batch's share of one lane; lanes come in order."""
        captions: list[str | None] = []
        done = 0
        for rows, begin, end in cursor.take(self._count * self._slot):
            if rows.captions is not None:
                captions += rows.captions.slice(begin, end - begin).to_pylist()
            for at, places in _blocks(done, done + end - begin, self._slot):
                size = (at.stop - at.start) * (places.stop - places.start)
                self._copy(rows, slice(begin, begin + size), lane, at, places, dtype)
                begin += size
                done += size
            del rows
        self._captions.append(captions)

    def _copy(self, rows: WindowRows, source: slice, lane: int, at: slice, places: slice, dtype: str) -> None:
        """A stretch of a window's rows into a rectangle of batches x places."""
        shape = (at.stop - at.start, places.stop - places.start)
        wide = slice(places.start * self._wide, places.stop * self._wide)
        halves = rows.latents[source].reshape(shape[0], shape[1] * self._wide)
        widen(halves, self._latents[at, lane, wide], dtype, rows.finite)
        self._sample_ids[at, lane, places] = rows.sample_ids[source].reshape(*shape, 2)
        self._labels[at, lane, places] = rows.labels[source].reshape(shape)
        self._sizes[at, lane, places] = rows.sizes[source].reshape(*shape, -1)

    def batch(self, index: int, step: int, epoch: int) -> Batch:
        labels = self._labels[index].reshape(-1)
        begin = index * self._slot
        texts = list(chain.from_iterable(lane[begin : begin + self._slot] for lane in self._captions))
        return Batch(
            step=step,
            epoch=epoch,
            bucket=self._bucket,
            latents=self._latents[index].reshape(-1, *self._shape),
            sample_ids=self._sample_ids[index].reshape(-1, 2),
            labels=labels if (labels >= 0).any() else None,
            captions=[text or "" for text in texts] if any(text is not None for text in texts) else None,
            sizes=self._sizes[index].reshape(-1, len(SIZE_COLUMNS)),
        )


def _blocks(begin: int, end: int, slot: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles (batches, places) that cover a lane's rows [begin, end), `slot` of which go to each batch."""
    while begin < end:
        batch, place = divmod(begin, slot)
        whole = 0 if place else (end - begin) // slot
        if whole:
            yield slice(batch, batch + whole), slice(0, slot)
            begin += whole * slot
        else:
            size = min(slot - place, end - begin)
            yield slice(batch, batch + 1), slice(place, place + size)
            begin += size
