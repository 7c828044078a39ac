"""Views are views, and halves become floats exactly."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.stream.columns import all_finite, binary_rows, fixed_bytes, integers, widen

EVERY = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("width", [1, 64, 1 << 16])
def test_every_half_widens_exactly(width: int) -> None:
    halves = EVERY.reshape(-1, width)
    out = np.empty((len(halves), 2, width), dtype=np.float32)[:, 1]
    values = halves.view(np.float16).astype(np.float32)
    widen(halves, out, "float16", finite=False)
    assert np.array_equal(out, values, equal_nan=True)
    widen(halves, out, "bfloat16", finite=True)
    assert np.array_equal(out.view(np.uint32), halves.astype(np.uint32) << 16)


def test_every_finite_half_widens_exactly_the_fast_way() -> None:
    halves = EVERY[(EVERY & 0x7C00) != 0x7C00].reshape(-1, 62)
    assert all_finite(halves, "float16")
    out = np.empty(halves.shape, dtype=np.float32)
    widen(halves, out, "float16", finite=True)
    expected = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))  # signs of zero as well


def test_rows_longer_than_a_block_widen_too() -> None:
    halves = (np.arange(3 << 17) % 0x7C00).astype(np.uint16).reshape(1, -1)
    out = np.empty(halves.shape, dtype=np.float32)
    widen(halves, out, "float16", finite=True)
    assert np.array_equal(out, halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize(("dtype", "mask"), [("float16", 0x7C00), ("bfloat16", 0x7F80)])
def test_each_infinity_and_nan_is_noticed(dtype: str, mask: int) -> None:
    bad = (EVERY & mask) == mask
    assert [all_finite(EVERY[at : at + 1], dtype) for at in range(1 << 16)] == (~bad).tolist()


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
