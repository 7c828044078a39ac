"""Views are views, and halves become floats exactly."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.store.schema import binary_rows, fixed_bytes
from pipeline.stream.data import integers, widened

EVERY = np.arange(1 << 16, dtype=np.uint16)


def test_every_half_widens_exactly() -> None:
    floats = EVERY.view(np.float16)
    assert np.array_equal(widened(floats), floats.astype(np.float32), equal_nan=True)
    assert np.array_equal(widened(EVERY).view(np.uint32), EVERY.astype(np.uint32) << 16)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(4)])
def test_fixed_bytes_is_a_view_of_any_binary_array_and_of_its_slices(kind: pa.DataType) -> None:
    array = pa.array([b"abcd", b"efgh", b"ijkl"], kind)
    view = fixed_bytes(array.slice(1, 2), 4)
    assert view.tobytes() == b"efghijkl"
    data = array.buffers()[-1]
    assert data.address <= view.ctypes.data < data.address + data.size
    assert fixed_bytes(array.slice(1, 0), 4).shape == (0, 4)
    assert binary_rows(pa.chunked_array([array, array.slice(2)]), 4).tobytes() == b"abcdefghijklijkl"
    with pytest.raises(ValueError, match="4 bytes long, not 5"):
        fixed_bytes(array, 5)
    with pytest.raises(ValueError, match="1 values are null"):
        fixed_bytes(pa.array([b"abcd", None], kind), 4)


def test_missing_integers_are_minus_one() -> None:
    assert integers(pa.chunked_array([pa.array([3, None], pa.int64()), pa.array([5])])).tolist() == [3, -1, 5]
