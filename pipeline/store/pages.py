"""Values of one length read straight from a Parquet column chunk: views of its pages, nothing decoded or copied.

A required BYTE_ARRAY column, PLAIN and uncompressed, is for each page a header (Thrift, compact protocol) and then,
value by value, a length of 4 bytes and the bytes (the Parquet format's Encodings.md and PageHeader in
parquet.thrift). Where all values have one length they are an evenly strided array. Latents are stored that way so
that reading them is one copy, from the page cache to where they are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Bytes = npt.NDArray[np.uint8]
_DATA_PAGE, _PLAIN = 0, 0
_LENGTH = 4  # bytes before each value


def plain_span(footer: pq.FileMetaData, group: int, column: str) -> tuple[int, int] | None:
    """(first byte, bytes) of a column chunk that `fixed_width_pages` can read; None where it must be decoded."""
    names = footer.schema.names
    if column not in names:
        return None
    place = names.index(column)
    described, chunk = footer.schema.column(place), footer.row_group(group).column(place)
    plain = (
        described.path == column
        and described.max_definition_level == described.max_repetition_level == 0
        and chunk.physical_type == "BYTE_ARRAY"
        and chunk.compression == "UNCOMPRESSED"
        and not chunk.has_dictionary_page
    )
    return (chunk.data_page_offset, chunk.total_compressed_size) if plain else None


def fixed_width_pages(chunk: Bytes, rows: int) -> list[Bytes]:
    """The values of a column chunk in order, as views [n, width] of its bytes, one per page.

    ValueError when the chunk is not what `plain_span` promised, when it does not hold `rows` values, or when they
    differ in length. Checksums are not looked at.
    """
    pages: list[Bytes] = []
    data: memoryview = chunk.data  # whose items are plain integers, quick to look at
    at, left, width = 0, rows, -1
    while left > 0:
        header, begin = _struct(data, at)
        size, page = header.get(3), header.get(5)
        if header.get(1) != _DATA_PAGE or not isinstance(page, dict) or page.get(2) != _PLAIN:
            raise ValueError(f"the page at byte {at} of the column is no plain data page")
        count = int(page.get(1, 0))
        if width < 0:
            width = int.from_bytes(data[begin : begin + _LENGTH], "little")
        at = begin + int(size or 0)
        if not 0 < count <= left or (_LENGTH + width) * count != at - begin or at > len(chunk):
            raise ValueError(f"a page of {at - begin} bytes does not hold {count} values of {width} bytes")
        whole = chunk[begin:at].reshape(count, _LENGTH + width)
        lengths = np.ndarray((count,), "<u4", whole, 0, (_LENGTH + width,))
        if (lengths != width).any():
            raise ValueError(f"a value is {int(lengths[lengths != width][0])} bytes long, not {width}")
        pages.append(whole[:, _LENGTH:])
        left -= count
    return pages


def fixed_width_values(column: pa.ChunkedArray) -> list[Bytes]:
    """The same of a decoded binary column; ValueError for a null, or when values differ in length."""
    parts: list[Bytes] = []
    width = -1
    for chunk in column.chunks:
        if chunk.null_count:
            raise ValueError(f"{chunk.null_count} values are null")
        if not len(chunk):
            continue
        word = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        _, starts, data = chunk.buffers()
        offsets = np.frombuffer(starts, word, len(chunk) + 1 + chunk.offset)[chunk.offset :]
        lengths = np.diff(offsets)
        width = int(lengths[0]) if width < 0 else width
        if (lengths != width).any():
            raise ValueError(f"a value is {int(lengths[lengths != width][0])} bytes long, not {width}")
        parts.append(np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]].reshape(-1, width))
    return parts


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
