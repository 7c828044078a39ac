"""Values of a stored Parquet column where they lie: views of its pages, nothing decoded, and parts of row groups."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.store.read.row_groups import Ints, reading_table

if TYPE_CHECKING:
    from pipeline.store.read.dataset import Dataset

# Values of one length read straight from a Parquet column chunk: views of its pages, nothing decoded or copied.
#
# A required BYTE_ARRAY column, PLAIN and uncompressed, is for each page a header (Thrift, compact protocol) and then,
# value by value, a length of 4 bytes and the bytes (the Parquet format's Encodings.md and PageHeader in
# parquet.thrift). Where all values have one length they are an evenly strided array. Latents are stored that way so
# that reading them is one copy, from the page cache to where they are needed: `gather` makes it, for rows in any
# order out of any number of columns.


Bytes = npt.NDArray[np.uint8]
_VIEW = np.dtype([("length", "<i4"), ("prefix", "<i4"), ("buffer", "<i4"), ("offset", "<i4")])
MAX_PART_BYTES = (1 << 31) - 1  # places in one piece of memory are 32-bit integers, there
_INLINE = 12  # a view holds so many bytes itself (Arrow columnar format, variable-size binary view layout)
_DATA_PAGE, _PLAIN = 0, 0
_LENGTH = 4  # bytes before each value


class PlainSpan(NamedTuple):
    """Where a column chunk lies whose values need no decoding."""

    start: int
    size_bytes: int
    optional: bool  # by its schema it may hold nulls: each page begins with which those are


def plain_span(footer: pq.FileMetaData, group: int, column: str) -> PlainSpan | None:
    """That of a column chunk that `fixed_width_pages` can read; None where it must be decoded."""
    names = footer.schema.names
    if column not in names:
        return None
    place = names.index(column)
    described, chunk = footer.schema.column(place), footer.row_group(group).column(place)
    if not (
        described.path == column
        and described.max_definition_level <= 1
        and described.max_repetition_level == 0
        and chunk.physical_type == "BYTE_ARRAY"
        and chunk.compression == "UNCOMPRESSED"
        and not chunk.has_dictionary_page
    ):
        return None
    return PlainSpan(chunk.data_page_offset, chunk.total_compressed_size, described.max_definition_level == 1)


def _plain_pages(
    window: Callable[[int], Bytes], start: int, stop: int, rows: int, optional: bool
) -> Iterator[tuple[int, int, int]]:
    """(where values begin, how many, bytes of one) of each page of plain values; ValueError where one is none.

    window: the bytes from a place on, those of a page's header and its first length at least.
    """
    width = -1
    while rows > 0:
        data = window(start)
        header, begin = _struct(data.data, 0)
        page, end = header.get(5), begin + int(header.get(3) or 0)
        if header.get(1) != _DATA_PAGE or not isinstance(page, dict) or page.get(2) != _PLAIN:
            raise ValueError(f"the page at byte {start} is no plain data page")
        count, length = int(page.get(1, 0)), slice(begin, begin + _LENGTH)
        if optional:  # first, which of them are null: such a one takes no place behind, so that none is missing there
            begin += _LENGTH + int.from_bytes(data[length].tobytes(), "little")
        if width < 0:
            width = int.from_bytes(data[begin : begin + _LENGTH].tobytes(), "little")
        fits = 0 < count <= rows and begin + _LENGTH <= len(data) and start + end <= stop
        if not fits or (_LENGTH + width) * count != end - begin:
            raise ValueError(f"a page of {end - begin} bytes does not hold {count} values of {width} bytes")
        yield start + begin, count, width
        start, rows = start + end, rows - count


@dataclass(frozen=True)
class FixedRows:
    """Values of one length where they lie: value i is data[starts[i] : starts[i] + width].

    data: uint8 [bytes], often a view of a file; starts: int64 [n].
    """

    data: Bytes
    starts: Ints
    width: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> FixedRows:
        return FixedRows(self.data, self.starts[rows], self.width)

    def values(self) -> Bytes:
        """A copy of all: uint8 [n, width]."""
        return gather([self.data], np.zeros(len(self), np.int32), self.starts, self.width)


def gather(parts: Sequence[Bytes], part_of: npt.NDArray[np.int32], starts: Ints, width: int) -> Bytes:
    """Values from several pieces of memory end to end, each copied once: uint8 [n, width], writable.

    Value i is parts[part_of[i]][starts[i] : starts[i] + width]. ValueError for a place outside its part, or a part
    above MAX_PART_BYTES.
    """
    sizes = np.array([len(part) for part in parts], np.int64)
    if len(starts) and ((starts < 0) | (starts + width > sizes[part_of])).any():
        raise ValueError("a value lies outside its column")
    if len(starts) and sizes.max() > MAX_PART_BYTES:
        raise ValueError(f"a part has {sizes.max()} bytes, of at most {MAX_PART_BYTES}")
    if width <= _INLINE or not len(starts):
        small = np.empty((len(starts), width), np.uint8)
        for at, part in enumerate(parts):
            mine = part_of == at
            small[mine] = part[starts[mine, None] + np.arange(width)]
        return small
    # Arrow's own loop over views makes the copy. Their prefix, which comparisons use, is not looked at.
    views = np.zeros(len(starts), _VIEW)
    views["length"], views["buffer"], views["offset"] = width, part_of, starts
    buffers = [None, pa.py_buffer(views), *map(pa.py_buffer, parts)]
    copied = pa.Array.from_buffers(pa.binary_view(), len(starts), buffers).cast(pa.large_binary())
    return np.frombuffer(copied.buffers()[-1], np.uint8).reshape(len(starts), width)


def fixed_width_pages(chunk: Bytes, rows: int, *, optional: bool) -> FixedRows:
    """The values of a column chunk in order, in its own bytes; optional as in its `PlainSpan`.

    ValueError when the chunk is not what `plain_span` promised, when it does not hold `rows` values, or when they
    differ in length. Checksums are not looked at.
    """
    starts, width = [np.zeros(0, np.int64)], 0
    for begin, count, width in _plain_pages(lambda at: chunk[at:], 0, len(chunk), rows, optional):
        lengths = np.ndarray((count,), "<u4", chunk[begin:], 0, (_LENGTH + width,))
        if (lengths != width).any():
            raise ValueError(f"a value is {int(lengths[lengths != width][0])} bytes long, not {width}")
        starts.append(np.arange(count, dtype=np.int64) * (_LENGTH + width) + (begin + _LENGTH))
    return FixedRows(chunk, np.concatenate(starts), width)


def fixed_width_values(column: pa.ChunkedArray) -> FixedRows:
    """The same of a decoded binary column; ValueError for a null, or when values differ in length."""
    values = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if values.null_count:
        raise ValueError(f"{values.null_count} values are null")
    if not len(values):
        return FixedRows(np.zeros(0, np.uint8), np.zeros(0, np.int64), 0)
    word = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    _, places, data = values.buffers()
    offsets = np.frombuffer(places, word, len(values) + 1 + values.offset)[values.offset :].astype(np.int64)
    lengths = np.diff(offsets)
    width = int(lengths[0])
    if (lengths != width).any():
        raise ValueError(f"a value is {int(lengths[lengths != width][0])} bytes long, not {width}")
    return FixedRows(np.frombuffer(data, np.uint8), offsets[:-1], width)


def _struct(data: memoryview, at: int) -> tuple[dict[int, Any], int]:
    """A Thrift compact struct: its integers and structs by field number, and where it ends.

    Whatever a page header has of other types (statistics are binary, flags are booleans) is passed over.
    """
    fields: dict[int, Any] = {}
    number = 0
    try:
        while True:
            head = data[at]
            at += 1
            if head == 0:
                return fields, at
            kind = head & 15
            if head >> 4:
                number += head >> 4
            else:
                number, at = _integer(data, at)
            if kind in (1, 2):  # the type is the value
                continue
            if kind in (4, 5, 6):
                fields[number], at = _integer(data, at)
            elif kind == 8:
                size, at = _varint(data, at)
                at += size
            elif kind == 12:
                fields[number], at = _struct(data, at)
            else:
                raise ValueError(f"a page header has a field of the unexpected type {kind}")
    except IndexError:
        raise ValueError("a page header ends too early") from None


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a page header holds an endless number")


def _integer(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


# -- Parts of a row group: of a plain column the bytes of some rows are enough --------


_HEADER_BYTES = 256  # a page's header has some thirty; where it has more, the column is read as a whole
_FILES = 1024  # mapped at a time; a process may have some 65,000 mappings
_GAP_BYTES = 64 << 10  # what is read in vain rather than asked for by one more request


@dataclass(frozen=True)
class ValuePlaces:
    """Where values of one `width` lie in a file: value i is its bytes [offsets[i], offsets[i] + width), int64 [n]."""

    path: str
    offsets: Ints
    width: int

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> ValuePlaces:
        return ValuePlaces(self.path, self.offsets[rows], self.width)

    @property
    def reach(self) -> int:
        """Bytes from the beginning of the first to the end of the last, in ascending places."""
        return int(self.offsets[-1] - self.offsets[0]) + self.width


class StoredParts:
    """Reads parts of row groups of one blob column: views of local files, ranged reads of remote ones.

    Nothing is decoded, and nothing checked but that each value has the length of the first. Safe to call from several
    threads. Raises what `Dataset.read` raises. remote: a part costs a request.
    """

    def __init__(self, dataset: Dataset, column: str) -> None:
        self._dataset, self._root, self._column = dataset, dataset.root, column
        self._described: dict[int, tuple[list[str], list[PlainSpan | None]]] = {}
        self._maps: dict[str, tuple[mmap.mmap, Bytes]] = {}
        self._lock = threading.Lock()
        self.remote = dataset.root.local_path() is None

    def places(self, row_group: int) -> ValuePlaces | None:
        """Those of a row group's visible rows, in order; None where the column must be read as a whole."""
        groups = self._dataset.row_groups
        file, number = groups.place(row_group)
        path = groups.path(file)
        span, rows = self._describe(file)[1][number], int(groups.stored("rows")[row_group])
        if span is None:
            return None
        stop, width, offsets = span.start + span.size_bytes, 0, [np.zeros(0, np.int64)]
        try:
            for begin, count, width in _plain_pages(
                lambda at: self._bytes(path, at, min(_HEADER_BYTES, stop - at)),
                *(span.start, stop, rows, span.optional),
            ):
                offsets.append(np.arange(count, dtype=np.int64) * (_LENGTH + width) + (begin + _LENGTH))
        except ValueError:
            return None
        places = ValuePlaces(path, np.concatenate(offsets), width)
        return places[self._dataset.alive(row_group)] if groups.partial[row_group] else places

    def columns(self, row_group: int) -> list[str]:
        """The names of all columns, in their order."""
        return self._describe(self._dataset.row_groups.place(row_group)[0])[0]

    def read(self, parts: Sequence[ValuePlaces], requests: Executor | None = None) -> list[FixedRows]:
        """The values of each part, in ascending places: in the file, or with all that lies between by one request.

        requests: makes those to a remote store, many at a time. A local disk is waited for here.
        """
        if self.remote:
            return list(map(self._request, parts) if requests is None else requests.map(self._request, parts))
        values: list[FixedRows] = []
        for places in parts:
            mapped, data = self._mapped(places.path)
            begin = int(places.offsets[0]) - _LENGTH
            _ask_for(mapped, begin, _LENGTH + places.reach)
            if len(data) > MAX_PART_BYTES:
                data = data[begin : begin + _LENGTH + places.reach]
            base = 0 if len(data) == len(mapped) else begin
            values.append(FixedRows(data, places.offsets - base, places.width))
        of_memory: dict[int, list[int]] = {}
        for at, one in enumerate(values):
            of_memory.setdefault(id(one.data), []).append(at)
        for mine in of_memory.values():
            data, width = values[mine[0]].data, values[mine[0]].width
            starts = np.concatenate([values[at].starts for at in mine])
            self._check(parts[mine[0]].path, data, starts, width)
            # Touch every memory page, in the order of the file, so that no copy has to wait.
            data[starts[:, None] + np.arange(0, width, mmap.PAGESIZE)].max(initial=0)
        return values

    def copy(self, places: ValuePlaces) -> Bytes:
        """A copy of the values, in ascending places: uint8 [n, width]; what is far between is not read."""
        cuts = np.flatnonzero(np.diff(places.offsets) > places.width + _GAP_BYTES) + 1
        runs = self.read([places[a:b] for a, b in pairwise([0, *cuts.tolist(), len(places)])])
        part_of = np.repeat(np.arange(len(runs), dtype=np.int32), [len(run) for run in runs])
        starts = np.concatenate([run.starts for run in runs])
        return gather([run.data for run in runs], part_of, starts, places.width)

    def values(self, row_group: int, rows: Ints, sizes: Ints) -> list[Bytes] | None:
        """The values of some rows, ascending, of a column whose values differ in length; sizes: of those of all rows.

        What lies near is read by one request. None where the column must be read as a whole: of several pages, with
        rows that are no longer visible, or damaged.
        """
        groups = self._dataset.row_groups
        file, number = groups.place(row_group)
        path, span = groups.path(file), self._describe(file)[1][number]
        if span is None or groups.partial[row_group] or len(sizes) != groups.stored("rows")[row_group]:
            return None
        # A page that is alone ends where its chunk does. Of several, those before the last are not where this says,
        # and the length before each value shows it.
        ends = np.cumsum(sizes + _LENGTH)
        ends += span.start + span.size_bytes - ends[-1]
        begins, stops = (ends - sizes - _LENGTH)[rows], ends[rows]
        if begins[0] < span.start:
            return None
        found: list[Bytes] = []
        cuts = np.flatnonzero(begins[1:] - stops[:-1] > _GAP_BYTES) + 1
        for run in np.split(np.arange(len(rows)), cuts):
            first, stop = int(begins[run[0]]), int(stops[run[-1]])
            if not self.remote:
                _ask_for(self._mapped(path)[0], first, stop - first)
            data = self._bytes(path, first, stop - first)
            for begin, end, size in zip(begins[run] - first, stops[run] - first, sizes[rows[run]], strict=True):
                if data[begin : begin + _LENGTH].tobytes() != int(size).to_bytes(_LENGTH, "little"):
                    return None
                found.append(data[begin + _LENGTH : end])
        return found

    def _request(self, places: ValuePlaces) -> FixedRows:
        begin = int(places.offsets[0]) - _LENGTH
        data = self._bytes(places.path, begin, _LENGTH + places.reach)
        self._check(places.path, data, places.offsets - begin, places.width)
        return FixedRows(data, places.offsets - begin, places.width)

    def _check(self, path: str, data: Bytes, starts: Ints, width: int) -> None:
        with reading_table(self._root.uri_of(path)):
            if int(starts.max()) + width > len(data):
                raise ValueError("it ends before its values do")
            words = data[(starts - _LENGTH)[:, None] + np.arange(_LENGTH)].view("<u4")
            if (words != width).any():
                raise ValueError(f"a value is {int(words[words != width][0])} bytes long, not {width}")

    def _describe(self, file: int) -> tuple[list[str], list[PlainSpan | None]]:
        """The columns of a file, and where this one lies in each of its row groups."""
        described = self._described.get(file)
        if described is None:
            footer = self._dataset.footer(file)
            with reading_table(self._root.uri_of(self._dataset.row_groups.path(file))):
                spans = [plain_span(footer, group, self._column) for group in range(footer.num_row_groups)]
                described = self._described[file] = (footer.schema.to_arrow_schema().names, spans)
        return described

    def _bytes(self, path: str, begin: int, length: int) -> Bytes:
        if not self.remote:
            return self._mapped(path)[1][begin : begin + length]
        with reading_table(self._root.uri_of(path)):
            return np.frombuffer(self._root.read_range(path, begin, length), np.uint8)

    def _mapped(self, path: str) -> tuple[mmap.mmap, Bytes]:
        """A local file's bytes; who has a view of them keeps the mapping."""
        found = self._maps.get(path)
        if found is None:
            with reading_table(self._root.uri_of(path)), open(str(self._root.local_path(path)), "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = (mapped, np.frombuffer(mapped, np.uint8))
            with self._lock:
                self._maps[path] = found
                while len(self._maps) > _FILES:
                    self._maps.pop(next(iter(self._maps)))
        return found


def _ask_for(mapped: mmap.mmap, begin: int, length: int) -> None:
    """Ask for bytes of a mapped file all at once: whoever touches the mapping waits for each page."""
    if hasattr(mmap, "MADV_WILLNEED"):  # not on every system; it is advice alone
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, begin + length - page)
