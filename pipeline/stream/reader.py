"""Windows read, split, shuffled and checked on threads, and the channel that hands batches over.

A latent stays in the pages of its file, brought into memory here, until it is copied into its batch: once. Only the
last of a window are copied twice, so that its memory is free before the next but one is read.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.store.read.row_groups import MAX_PART_BYTES, Bytes, FixedRows
from pipeline.stream.data import Choice, LatentRows, binary_rows, id_words, integers
from pipeline.stream.order import Piece, Window

SIZE_COLUMNS = ("original_height", "original_width", "crop_top", "crop_left", "crop_height", "crop_width")

_PAGE_BYTES = 4096

T = TypeVar("T")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class WindowRows:
    """The rows of a window in the order served, all of one latent `shape` [c, h, w].

    Latent i is memory[part[i]][start[i] : start[i] + 2*c*h*w], stored bytes (see `store.pages.gather`); part: int32
    [n]; start: int64 [n]. sample_ids: uint64 [n, 2]; labels: int64 [n], -1 for none; sizes: int32 [n, 6]; captions:
    n strings; None where they are not wanted.
    """

    shape: Shape
    memory: tuple[Bytes, ...]
    part: NDArray[np.int32]
    start: NDArray[np.int64]
    sample_ids: NDArray[np.uint64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32] | None
    captions: pa.Array | None


class WindowReader:
    """Reads windows on threads; the pieces of a window are of the rows that are chosen."""

    def __init__(
        self,
        dataset: LatentRows,
        choice: Choice,
        *,
        captions: bool,
        threads: int,
        sizes: bool = True,
        verify: bool = False,
    ) -> None:
        self._dataset, self._choice, self._captions, self._verify = dataset, choice, captions, verify
        self._sizes, self._all = sizes, choice == Choice()
        wanted = [*choice.columns, "label", *(SIZE_COLUMNS if sizes else ()), *(["caption"] if captions else ())]
        self._columns = list(dict.fromkeys(wanted))
        self._shapes: dict[int, Shape] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="latent-reader")

    def submit(self, window: Window) -> Future[WindowRows]:
        return self._pool.submit(self._read, window)

    def close(self) -> None:
        """Drop what has not begun and wait for what has; afterwards none of the threads is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, window: Window) -> WindowRows:
        # The latent shape of the window's bucket, read once: all its rows share it.
        if window.bucket not in self._shapes:
            group = window.pieces[0].row_group
            table = self._dataset.read(group, ["latent_shape"], verify=self._verify)
            stored = table.column("latent_shape")[0].as_py()
            if stored is None or len(stored) != 3 or min(stored) < 1:
                raise self._unusable(group, f"its latent shape is {stored}, not [c, h, w]")
            self._shapes[window.bucket] = (stored[0], stored[1], stored[2])
        shape = self._shapes[window.bucket]
        wide = 2 * math.prod(shape)
        parts: list[_Part] = []
        for piece in window.pieces:
            try:
                parts.append(self._read_piece(piece, wide))
            except ValueError as problem:
                raise self._unusable(piece.row_group, str(problem)) from problem
        return _joined(shape, parts, None if window.key is None else window.permutation())

    def _read_piece(self, piece: Piece, wide: int) -> _Part:
        table = self._dataset.read(piece.row_group, self._columns, verify=self._verify)
        ids = id_words(binary_rows(table.column("sample_id"), 16))
        # The piece's rows among all rows of its row group.
        expected = self._dataset.row_groups[piece.row_group].num_rows
        if len(table) != expected:
            raise self._unusable(piece.row_group, f"it gave {len(table)} rows where the manifest has {expected}")
        chosen: slice | NDArray[np.int64] = slice(piece.start, piece.stop)
        if not self._all:
            chosen = self._choice.rows(table)[piece.start : piece.stop]
            if len(chosen) != piece.stop - piece.start:
                raise self._unusable(piece.row_group, "its chosen rows are not those counted before")
        latents = self._dataset.read_fixed(piece.row_group, "latent", verify=self._verify)
        if len(latents) != len(ids):
            raise ValueError(f"it gave {len(latents)} latents for {len(ids)} rows")
        latents, count = latents[chosen], piece.stop - piece.start
        if latents.width != wide:
            raise ValueError(f"a value is {latents.width} bytes long, not {wide}")
        if len(latents.data) > MAX_PART_BYTES:
            raise ValueError(f"its latents take {len(latents.data)} bytes, of at most {MAX_PART_BYTES}")
        if len(latents):
            # Touch every memory page, so that the disk is waited for here and in the order of the file.
            begin, end = int(latents.starts[0]), int(latents.starts[-1]) + latents.width
            latents.data[begin:end:_PAGE_BYTES].max()
        sizes = None
        if self._sizes:
            sizes = np.empty((count, len(SIZE_COLUMNS)), dtype=np.int32)
            for at, name in enumerate(SIZE_COLUMNS):
                sizes[:, at] = integers(table.column(name))[chosen]
        captions = None
        if self._captions:
            column = table.column("caption").combine_chunks()
            whole = isinstance(chosen, slice)
            captions = column.slice(piece.start, count) if whole else column.take(pa.array(chosen))
        return _Part(latents, ids[chosen], integers(table.column("label"))[chosen], sizes, captions)

    def _unusable(self, row_group: int, problem: str) -> InputError:
        info = self._dataset.row_groups[row_group]
        return InputError(
            f"row group {row_group} of the latent dataset cannot be used: {problem}",
            key="file",
            value=info.file,
            next_step="run the verify job on the dataset",
        )


@dataclass(frozen=True)
class _Part:
    """A piece's rows, as laid out; see `WindowRows`."""

    latents: FixedRows
    sample_ids: NDArray[np.uint64]
    labels: NDArray[Any]
    sizes: NDArray[np.int32] | None
    captions: pa.Array | None


def _joined(shape: Shape, parts: list[_Part], order: NDArray[np.int64] | None) -> WindowRows:
    """Parts end to end, then in the order served."""

    def joined(arrays: list[Any]) -> Any:
        if arrays[0] is None:
            return None
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return whole if order is None else np.take(whole, order, axis=0, mode="clip")

    captions = None
    if parts[0].captions is not None:
        captions = pa.chunked_array([part.captions for part in parts]).combine_chunks()
        captions = captions if order is None else captions.take(pa.array(order))
    part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.latents) for part in parts])
    return WindowRows(
        shape,
        tuple(part.latents.data for part in parts),
        joined([part_of]),
        joined([part.latents.starts for part in parts]),
        joined([part.sample_ids for part in parts]),
        joined([part.labels for part in parts]).astype(np.int64, copy=False),
        joined([part.sizes for part in parts]),
        captions,
    )


class Channel(Generic[T]):
    """A bounded queue between one producing and one consuming thread, which either end may shut.

    Items come in packets: a packet is taken in once there are fewer than `capacity` items, whatever its size.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._packets: deque[list[T]] = deque()
        self._count = 0
        self._changed = threading.Condition()
        self._finished = self._closed = False

    def put(self, packet: list[T]) -> bool:
        """Wait for room and hand the packet over; False when nobody will take it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._count < self._capacity)
            if not self._closed:
                self._packets.append(packet)
                self._count += len(packet)
                self._changed.notify_all()
            return not self._closed

    def get(self) -> list[T] | None:
        """The next packet; None when there will be no other."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._finished or bool(self._packets))
            if self._closed or not self._packets:
                return None
            packet = self._packets.popleft()
            self._count -= len(packet)
            self._changed.notify_all()
            return packet

    def finish(self) -> None:
        """The producer's end: what is queued can still be taken."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """The consumer's end: what is queued is dropped, and a waiting producer is let go."""
        with self._changed:
            self._closed = True
            self._packets.clear()
            self._changed.notify_all()
