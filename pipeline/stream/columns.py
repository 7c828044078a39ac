"""Arrow columns as numpy arrays; `fixed_bytes` is a view of the Arrow buffer, not a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def fixed_bytes(array: pa.Array, width: int) -> NDArray[np.uint8]:
    """The values of a binary array that are all `width` bytes long, without a copy: uint8 [n, width].

    Raises ValueError for a null or for a value of another length.
    """
    if array.null_count:
        raise ValueError(f"{array.null_count} values are null")
    buffers, count, first = array.buffers(), len(array), array.offset
    if not count:
        return np.empty((0, width), dtype=np.uint8)
    if pa.types.is_fixed_size_binary(array.type):
        if array.type.byte_width != width:
            raise ValueError(f"values are {array.type.byte_width} bytes long, not {width}")
        start = first * width
    else:
        word = np.int64 if pa.types.is_large_binary(array.type) else np.int32
        offsets = np.frombuffer(buffers[1], dtype=word, count=first + count + 1)[first:]
        lengths = np.diff(offsets)
        if not (lengths == width).all():
            raise ValueError(f"a value is {int(lengths[lengths != width][0])} bytes long, not {width}")
        start = int(offsets[0])
    return np.frombuffer(buffers[-1], dtype=np.uint8, count=count * width, offset=start).reshape(count, width)


def binary_rows(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    """`fixed_bytes` of a column, which is copied only when it came in several chunks."""
    parts = [fixed_bytes(chunk, width) for chunk in column.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, width), np.uint8), *parts])


def integers(column: pa.ChunkedArray) -> NDArray[Any]:
    """An integer column in its own dtype, -1 for null."""
    filled = pc.fill_null(column, -1) if column.null_count else column
    return np.asarray(filled.to_numpy())
