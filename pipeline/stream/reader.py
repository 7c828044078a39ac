"""Windows read, split, shuffled and checked on threads, and the channel that hands batches over.

A window is copied once, from the Arrow buffers to its rows' shuffled places; the Arrow tables are dropped at
once, so that a window costs the bytes of its rows and nothing else.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.stream.columns import Halves, all_finite, binary_rows, integers
from pipeline.stream.data import LatentRows
from pipeline.stream.order import Piece, Window
from pipeline.stream.split import held_out, id_words

SIZE_COLUMNS = ("original_height", "original_width", "crop_top", "crop_left", "crop_height", "crop_width")

T = TypeVar("T")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class WindowRows:
    """The rows of a window in the order in which they are served.

    latents: stored bits uint16 [n, c*h*w] of `shape` [c, h, w]; finite: none of them is an infinity or NaN;
    sample_ids: uint64 [n, 2]; labels: int64 [n], -1 for none; sizes: int32 [n, 6]; captions: n strings.
    """

    shape: Shape
    latents: Halves
    finite: bool
    sample_ids: NDArray[np.uint64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    captions: pa.Array | None


class WindowReader:
    """Reads windows on threads. `side`: None for all rows, else (share, True for the held-out rows)."""

    def __init__(self, dataset: LatentRows, side: tuple[float, bool] | None, *, captions: bool, threads: int) -> None:
        self._dataset, self._side, self._captions = dataset, side, captions
        self._columns = ["sample_id", "latent", "label", *SIZE_COLUMNS, *(["caption"] if captions else [])]
        self._shapes: dict[int, Shape] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="latent-reader")

    def submit(self, window: Window) -> Future[WindowRows]:
        return self._pool.submit(self._read, window)

    def close(self) -> None:
        """Drop what has not begun and wait for what has; afterwards none of the threads is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, window: Window) -> WindowRows:
        count = window.num_rows
        shape = self._shape(window)
        places = np.empty(count, dtype=np.int64)  # where each laid-out row is served
        places[window.permutation()] = np.arange(count, dtype=np.int64)
        rows = WindowRows(
            shape,
            np.empty((count, int(np.prod(shape))), dtype=np.uint16),
            True,
            np.empty((count, 2), dtype=np.uint64),
            np.empty(count, dtype=np.int64),
            np.empty((count, len(SIZE_COLUMNS)), dtype=np.int32),
            None,
        )
        captions: list[pa.Array] = []
        done = 0
        for piece in window.pieces:
            stop = done + piece.stop - piece.start
            captions += self._place(piece, rows, places[done:stop])
            done = stop
        finite = all_finite(rows.latents, self._dataset.latent_dtype)
        texts = pa.chunked_array(captions).combine_chunks() if captions else None
        if texts is not None:
            texts = texts.take(pa.array(np.argsort(places)))
        return WindowRows(shape, rows.latents, finite, rows.sample_ids, rows.labels, rows.sizes, texts)

    def _place(self, piece: Piece, rows: WindowRows, places: NDArray[np.int64]) -> list[pa.Array]:
        """Copy a piece's rows to their places; returns its captions, which are moved later."""
        table = self._dataset.read(piece.row_group, self._columns)
        try:
            ids = id_words(binary_rows(table.column("sample_id"), 16))
            latents = binary_rows(table.column("latent"), 2 * rows.latents.shape[1]).view(np.uint16)
        except ValueError as problem:
            raise self._unusable(piece.row_group, str(problem)) from problem
        chosen = self._choose(piece, ids)
        rows.sample_ids[places] = ids[chosen]
        rows.latents[places] = latents[chosen]
        rows.labels[places] = integers(table.column("label"))[chosen]
        for at, name in enumerate(SIZE_COLUMNS):
            rows.sizes[places, at] = integers(table.column(name))[chosen]
        if not self._captions:
            return []
        column = table.column("caption")
        if isinstance(chosen, slice):
            return list(column.slice(piece.start, piece.stop - piece.start).chunks)
        return list(column.take(pa.array(chosen)).chunks)

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
            shape = self._dataset.read(group, ["latent_shape"]).column("latent_shape")[0].as_py()
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


class Channel(Generic[T]):
    """A bounded queue between one producing and one consuming thread, which either end may shut."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._finished = self._closed = False

    def put(self, item: T) -> bool:
        """Wait for room and hand the item over; False when nobody will take it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def get(self) -> T | None:
        """The next item; None when there will be no other."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._finished or bool(self._items))
            if self._closed or not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def finish(self) -> None:
        """The producer's end: what is queued can still be taken."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """The consumer's end: what is queued is dropped, and a waiting producer is let go."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
