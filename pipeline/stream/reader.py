"""Windows read, split, shuffled and checked on threads, and the channel that hands batches over.

A latent is copied once into its window, from the file's pages, and once from there into its batch. The windows'
memory is used again and again: what the system must fill with zeros for each new window costs more than the copy.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.stream.columns import binary_rows, integers
from pipeline.stream.data import LatentRows
from pipeline.stream.order import Piece, Window
from pipeline.stream.split import held_out, id_words

SIZE_COLUMNS = ("original_height", "original_width", "crop_top", "crop_left", "crop_height", "crop_width")

T = TypeVar("T")
Shape = tuple[int, int, int]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class WindowRows:
    """The rows of a window.

    latents: stored bytes uint8 [n, 2*c*h*w] of `shape` [c, h, w], as laid out; order: which of them is served at
    each place, int64 [n], None when kept in order. All else is in the order served: sample_ids: uint64 [n, 2];
    labels: int64 [n], -1 for none; sizes: int32 [n, 6]; captions: n strings; None where they are not wanted.
    """

    shape: Shape
    latents: Bytes
    order: NDArray[np.int64] | None
    sample_ids: NDArray[np.uint64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32] | None
    captions: pa.Array | None


class WindowReader:
    """Reads windows on threads. `side`: None for all rows, else (share, True for the held-out rows)."""

    def __init__(
        self,
        dataset: LatentRows,
        side: tuple[float, bool] | None,
        *,
        captions: bool,
        threads: int,
        sizes: bool = True,
        verify: bool = False,
    ) -> None:
        self._dataset, self._side, self._captions, self._verify = dataset, side, captions, verify
        self._sizes = sizes
        self._columns = ["sample_id", "label", *(SIZE_COLUMNS if sizes else ()), *(["caption"] if captions else ())]
        self._shapes: dict[int, Shape] = {}
        self._memory = _Memory()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="latent-reader")

    def submit(self, window: Window) -> Future[WindowRows]:
        return self._pool.submit(self._read, window)

    def close(self) -> None:
        """Drop what has not begun and wait for what has; afterwards none of the threads is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, window: Window) -> WindowRows:
        count, shape = window.num_rows, self._shape(window)
        wide = 2 * math.prod(shape)
        memory = self._memory.take(count * wide)
        latents = memory[: count * wide].reshape(count, wide)
        order = None if window.key is None else window.permutation()
        parts: list[_Small] = []
        done = 0
        for piece in window.pieces:
            stop = done + piece.stop - piece.start
            try:
                parts.append(self._read_piece(piece, latents[done:stop]))
            except ValueError as problem:
                raise self._unusable(piece.row_group, str(problem)) from problem
            done = stop
        small = _joined(parts, order)
        rows = WindowRows(shape, latents, order, small.sample_ids, small.labels, small.sizes, small.captions)
        weakref.finalize(rows, self._memory.give_back, memory).atexit = False
        return rows

    def _read_piece(self, piece: Piece, latents: Bytes) -> _Small:
        """Copy a piece's latents to their place; everything else of its rows is returned."""
        table = self._dataset.read(piece.row_group, self._columns, verify=self._verify)
        ids = id_words(binary_rows(table.column("sample_id"), 16))
        chosen = self._choose(piece, ids)
        pages = self._dataset.read_fixed(piece.row_group, "latent", verify=self._verify)
        _copy_rows(pages, chosen, latents)
        sizes = None
        if self._sizes:
            sizes = np.empty((len(latents), len(SIZE_COLUMNS)), dtype=np.int32)
            for at, name in enumerate(SIZE_COLUMNS):
                sizes[:, at] = integers(table.column(name))[chosen]
        captions = None
        if self._captions:
            column = table.column("caption").combine_chunks()
            whole = isinstance(chosen, slice)
            captions = column.slice(piece.start, len(latents)) if whole else column.take(pa.array(chosen))
        return _Small(ids[chosen], integers(table.column("label"))[chosen], sizes, captions)

    def _choose(self, piece: Piece, ids: NDArray[np.uint64]) -> slice | NDArray[np.int64]:
        """The piece's rows among all rows of its row group."""
        expected = self._dataset.row_groups[piece.row_group].num_rows
        if len(ids) != expected:
            raise self._unusable(piece.row_group, f"it gave {len(ids)} rows where the manifest has {expected}")
        if self._side is None:
            return slice(piece.start, piece.stop)
        share, held = self._side
        chosen = np.flatnonzero(held_out(ids, share) == held)[piece.start : piece.stop]
        if len(chosen) != piece.stop - piece.start:
            raise self._unusable(piece.row_group, "its held-out rows are not those counted before")
        return chosen

    def _shape(self, window: Window) -> Shape:
        """The latent shape of the window's bucket, read once: all its rows share it."""
        if window.bucket not in self._shapes:
            group = window.pieces[0].row_group
            table = self._dataset.read(group, ["latent_shape"], verify=self._verify)
            shape = table.column("latent_shape")[0].as_py()
            if shape is None or len(shape) != 3 or min(shape) < 1:
                raise self._unusable(group, f"its latent shape is {shape}, not [c, h, w]")
            self._shapes[window.bucket] = (shape[0], shape[1], shape[2])
        return self._shapes[window.bucket]

    def _unusable(self, row_group: int, problem: str) -> InputError:
        info = self._dataset.row_groups[row_group]
        return InputError(
            f"row group {row_group} of the latent dataset cannot be used: {problem}",
            key="file",
            value=info.file,
            next_step="run the verify job on the dataset",
        )


@dataclass(frozen=True)
class _Small:
    """What rows hold besides their latents; see `WindowRows`."""

    sample_ids: NDArray[np.uint64]
    labels: NDArray[Any]
    sizes: NDArray[np.int32] | None
    captions: pa.Array | None


def _joined(parts: list[_Small], order: NDArray[np.int64] | None) -> _Small:
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
    labels = joined([part.labels for part in parts]).astype(np.int64, copy=False)
    return _Small(
        joined([part.sample_ids for part in parts]), labels, joined([part.sizes for part in parts]), captions
    )


def _copy_rows(pages: list[Bytes], chosen: slice | NDArray[np.int64], out: Bytes) -> None:
    """The chosen rows (ascending) of pages [n_i, width] laid end to end, into out [n, width]."""
    first = done = 0
    for page in pages:
        stop = first + len(page)
        if isinstance(chosen, slice):
            taken: Any = slice(max(chosen.start - first, 0), max(min(chosen.stop, stop) - first, 0))
            count = max(0, taken.stop - taken.start)
        else:
            low, high = np.searchsorted(chosen, (first, stop))
            taken, count = chosen[low:high] - first, int(high - low)
        if count:
            if page.shape[1] != out.shape[1]:
                raise ValueError(f"a value is {page.shape[1]} bytes long, not {out.shape[1]}")
            out[done : done + count] = page[taken]
        done, first = done + count, stop
    if done != len(out):
        raise ValueError(f"it gave {first} latents, which do not hold the {len(out)} asked for")


class _Memory:
    """Pieces of memory used one after the other by windows of about one size."""

    def __init__(self) -> None:
        self._free: list[Bytes] = []
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> Bytes:
        """At least that many bytes, not cleared; what is never touched of them takes no memory."""
        with self._lock:
            fitting = [at for at, piece in enumerate(self._free) if len(piece) >= size_bytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda at: len(self._free[at])))
            del self._free[:1]  # too small for this one: do not keep it as well
        return np.empty(1 << max(0, size_bytes - 1).bit_length(), dtype=np.uint8)

    def give_back(self, piece: Bytes) -> None:
        """Nobody looks at it any more."""
        with self._lock:
            self._free.append(piece)


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
