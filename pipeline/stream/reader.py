"""Windows read, split, shuffled and checked on threads, and the channel that hands batches over.

A latent stays in the pages of its file, brought into memory here, until it is copied into its batch: once. Only the
last of a window are copied twice, so that its memory is free before the next but one is read, and those that lie
scattered among rows that are not served.
"""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.store.read.pages import MAX_PART_BYTES, Bytes, FixedRows, StoredParts, ValuePlaces
from pipeline.store.schema import binary_rows, id_words
from pipeline.stream.data import Captions, Choice, FileRows, LatentRows, TextRows, integers
from pipeline.stream.order import Piece, Window

if TYPE_CHECKING:
    from pipeline.store.read.dataset import Dataset

SIZE_COLUMNS = ("original_height", "original_width", "crop_top", "crop_left", "crop_height", "crop_width")

# Ids, labels and the like of the row groups in use. With the default settings 2,048 are at a time, of all ranks
# together: of latents of 8 KiB without captions, 200 MiB.
_KEPT_BYTES = 256 << 20
_REQUESTS = 16  # under way at a time: a remote store answers each after tens of milliseconds

T = TypeVar("T")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class WindowRows:
    """The rows of a window in the order served, all of one latent `shape` [c, h, w].

    Latent i is memory[part[i]][start[i] : start[i] + 2*c*h*w], stored bytes (see `read.pages.gather`); part: int32
    [n]; start: int64 [n]. sample_ids: uint64 [n, 2]; labels: int64 [n], -1 for none; sizes: int32 [n, 6]; captions:
    n strings; text: gives what `TextRows.fetch` does for rows [begin, end); None where they are not wanted.
    """

    shape: Shape
    memory: tuple[Bytes, ...]
    part: NDArray[np.int32]
    start: NDArray[np.int64]
    sample_ids: NDArray[np.uint64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32] | None
    captions: pa.Array | None
    text: Callable[[int, int], list[Any]] | None = None


class WindowReader:
    """Reads windows on threads; the pieces of a window are of the rows that are chosen.

    A piece's latents are read as a part of their row group where that can be: a view of a local file, a request to a
    remote store, many of them at a time. What else is wanted of the row group is read once and kept for later pieces.
    Text comes with its window, too, where it fits: rows that lie together were embedded one after the other, so that
    what they need of the embeddings lies together, and is read by few requests.
    """

    def __init__(
        self,
        dataset: LatentRows,
        choice: Choice,
        *,
        captions: Captions | None,
        threads: int,
        text: TextRows | None = None,
        seed: int = 0,
        sizes: bool = True,
        verify: bool = False,
    ) -> None:
        self._dataset, self._choice, self._captions, self._verify = dataset, choice, captions, verify
        self._text, self._seed = text, seed
        self._sizes, self._all = sizes, choice == Choice()
        wanted = [*choice.columns, "label", *(SIZE_COLUMNS if sizes else ()), *(captions.columns if captions else ())]
        self._columns = list(dict.fromkeys(wanted))
        self._shapes: dict[int, Shape] = {}
        self._files = cast("Dataset", dataset) if isinstance(dataset, FileRows) else None
        self._stored = None if self._files is None else StoredParts(self._files, "latent")
        self._groups: dict[int, _Rows] = {}
        self._kept_bytes, self._checked = 0, set[int]()
        self._lock, self._random = threading.Lock(), random.Random(0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="latent-reader")
        self._requests: Executor | None = None
        if (self._stored is not None and self._stored.remote) or (text is not None and text.remote):
            self._requests = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="latent-request")

    def submit(self, window: Window) -> Future[WindowRows]:
        return self._pool.submit(self._read, window)

    def close(self) -> None:
        """Drop what has not begun and wait for what has; afterwards none of the threads is left."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._requests is not None:
            self._requests.shutdown(wait=True, cancel_futures=True)

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
        numbers = list(dict.fromkeys(piece.row_group for piece in window.pieces))
        each = map if self._requests is None else self._requests.map
        groups = dict(zip(numbers, each(self._group, numbers), strict=True))
        parts = []
        for piece in window.pieces:
            parts.append(groups[piece.row_group][piece.start : piece.stop])
            if len(parts[-1].ids) < piece.stop - piece.start:
                raise self._unusable(piece.row_group, "its chosen rows are not those counted before")
        latents = self._latents(window.pieces, parts, 2 * math.prod(shape))
        rows = _joined(shape, parts, latents, None if window.key is None else window.permutation())
        if rows.captions is not None and pa.types.is_list(rows.captions.type):
            rows = replace(rows, captions=Captions.drawn(rows.captions, rows.sample_ids, self._seed, window.epoch))
        if rows.captions is not None and self._text is not None:
            return replace(rows, text=self._text_of(rows.captions.to_pylist()))
        return rows

    def _text_of(self, captions: list[str | None]) -> Callable[[int, int], list[Any]]:
        """See `WindowRows.text`: fetched now, or where there is no room for all of it, for some rows when asked."""
        assert self._text is not None
        fetch = partial(self._text.fetch, requests=self._requests, verify=self._verify)
        held = fetch(captions, ahead=True)
        if held is not None:
            return lambda begin, end: held[begin:end]
        return lambda begin, end: fetch(captions[begin:end]) or []

    def _group(self, row_group: int) -> _Rows:
        """The chosen rows of a row group, kept until others take their room."""
        rows = self._groups.get(row_group)
        if rows is None:
            with self._naming(row_group):
                rows = self._read_group(row_group)
            with self._lock:
                if row_group not in self._groups and rows.size_bytes <= _KEPT_BYTES:
                    # They come round in turn: by age, each would go just before it is needed again.
                    while self._kept_bytes + rows.size_bytes > _KEPT_BYTES:
                        gone = self._groups.pop(self._random.choice(list(self._groups)))  # no batch depends on which
                        self._kept_bytes -= gone.size_bytes
                    self._groups[row_group] = rows
                    self._kept_bytes += rows.size_bytes
        return rows

    def _read_group(self, row_group: int) -> _Rows:
        table = self._dataset.read(row_group, self._columns, verify=self._verify)
        # The chosen rows among all rows of the row group.
        expected = self._dataset.row_groups[row_group].num_rows
        if len(table) != expected:
            raise self._unusable(row_group, f"it gave {len(table)} rows where the manifest has {expected}")
        places = None if self._stored is None else self._stored.places(row_group)
        if places is not None and len(places) != expected:
            raise ValueError(f"it gave {len(places)} latents for {expected} rows")
        if places is not None and self._verify and row_group not in self._checked:
            # No checksum tells of a part: all are checked, once, before the first is used.
            self._dataset.read(row_group, ["latent"], verify=True)
            self._checked.add(row_group)
        sizes = None
        if self._sizes:
            sizes = np.empty((expected, len(SIZE_COLUMNS)), dtype=np.int32)
            for at, name in enumerate(SIZE_COLUMNS):
                sizes[:, at] = integers(table.column(name))
        rows = _Rows(
            np.arange(expected),
            places,
            id_words(binary_rows(table.column("sample_id"), 16)),
            integers(table.column("label")).astype(np.int64, copy=False),
            sizes,
            self._captions.of(table) if self._captions else None,
        )
        rows = rows if self._all else rows[self._choice.rows(table)]
        return self._without_withdrawn(row_group, rows)

    def _without_withdrawn(self, row_group: int, rows: _Rows) -> _Rows:
        """Chosen rows; in place of each that was withdrawn since they were pinned the next one that was not.

        So the order stays what it was, and nothing of what was withdrawn is served.
        """
        gone = None if self._files is None else self._files.withdrawn_in(row_group)
        if gone is None or not len(rows.ids):
            return rows
        kept = np.flatnonzero(~gone[rows.stored])
        if not len(kept):
            raise InputError(
                f"All rows of row group {row_group} that this run serves were withdrawn",
                rule="a run goes on in the order that it began with; a withdrawn row is replaced by one beside it",
                next_step="start a new run with another output.uri, from this one's weights with model.init.uri",
            )
        return rows[kept[np.searchsorted(kept, np.arange(len(rows.ids))).clip(max=len(kept) - 1)]]

    def _latents(self, pieces: Sequence[Piece], parts: Sequence[_Rows], wide: int) -> list[FixedRows]:
        """The latents of each part, of `wide` bytes."""
        values: dict[int, FixedRows] = {}
        together: dict[int, ValuePlaces] = {}
        for at, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
            with self._naming(piece.row_group):
                if self._stored is None or part.places is None:
                    whole = self._dataset.read_fixed(piece.row_group, "latent", verify=self._verify)
                    if len(whole) != self._dataset.row_groups[piece.row_group].num_rows:
                        raise ValueError(f"it gave {len(whole)} latents, not one for each row")
                    values[at] = whole[part.stored]
                    if 2 * len(part.ids) < len(whole):
                        values[at] = _packed(values[at].values())
                    elif len(whole.data) > MAX_PART_BYTES:
                        raise ValueError(f"its latents take {len(whole.data)} bytes, of at most {MAX_PART_BYTES}")
                elif 2 * len(part.ids) * wide < part.places.reach:
                    # Most of what lies between is not served: it would take the memory of other rows.
                    values[at] = _packed(self._stored.copy(part.places))
                else:
                    together[at] = part.places
                width = together[at].width if at in together else values[at].width
                if width != wide:
                    raise ValueError(f"a value is {width} bytes long, not {wide}")
        if self._stored is not None and together:
            values |= zip(together, self._stored.read(list(together.values()), self._requests), strict=True)
        return [values[at] for at in range(len(parts))]

    @contextmanager
    def _naming(self, row_group: int) -> Iterator[None]:
        """Errors in what a row group holds say so."""
        try:
            yield
        except ValueError as problem:
            raise self._unusable(row_group, str(problem)) from problem

    def _unusable(self, row_group: int, problem: str) -> InputError:
        info = self._dataset.row_groups[row_group]
        return InputError(
            f"row group {row_group} of the latent dataset cannot be used: {problem}",
            key="file",
            value=info.file,
            next_step="run the verify job on the dataset",
        )


@dataclass(frozen=True)
class _Rows:
    """Chosen rows of a row group but for their latents, see `WindowRows`.

    stored: their places among the visible rows of the row group, int64 [n]; places: those of their latents in the
    file, None where the column must be read as a whole.
    """

    stored: NDArray[np.int64]
    places: ValuePlaces | None
    ids: NDArray[np.uint64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32] | None
    captions: pa.Array | None

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> _Rows:
        captions = self.captions
        if captions is not None:
            captions = captions[rows] if isinstance(rows, slice) else captions.take(pa.array(rows))
        return _Rows(
            self.stored[rows],
            None if self.places is None else self.places[rows],
            self.ids[rows],
            self.labels[rows],
            None if self.sizes is None else self.sizes[rows],
            captions,
        )

    @cached_property
    def size_bytes(self) -> int:
        """Memory that they take."""
        places = None if self.places is None else self.places.offsets
        arrays = (self.stored, places, self.ids, self.labels, self.sizes, self.captions)
        return sum(int(array.nbytes) for array in arrays if array is not None)


def _packed(values: Bytes) -> FixedRows:
    """Values [n, width] in memory of their own."""
    return FixedRows(values.reshape(-1), np.arange(len(values), dtype=np.int64) * values.shape[1], values.shape[1])


def _joined(
    shape: Shape, parts: Sequence[_Rows], latents: Sequence[FixedRows], order: NDArray[np.int64] | None
) -> WindowRows:
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
    # Parts of one local file are views of the same memory.
    memory = {id(values.data): values.data for values in latents}
    number = dict(zip(memory, range(len(memory)), strict=True))
    of_parts = np.array([number[id(values.data)] for values in latents], dtype=np.int32)
    return WindowRows(
        shape,
        tuple(memory.values()),
        joined([np.repeat(of_parts, [len(values) for values in latents])]),
        joined([values.starts for values in latents]),
        joined([part.ids for part in parts]),
        joined([part.labels for part in parts]),
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
