"""Arrow schemas of the rows in a dataset, and the way from a latent column to numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa

LATENT_DTYPES = ("float16", "bfloat16")

# Row address and variant: the columns every kind of dataset starts with.
ADDRESS = [
    pa.field("sample_id", pa.binary(16), False),
    pa.field("key", pa.string(), False),
    pa.field("unit", pa.int64(), False),
    pa.field("row", pa.int64(), False),
    pa.field("variant", pa.int32(), False),
]

LATENTS = pa.schema(
    [
        *ADDRESS,
        pa.field("bucket", pa.string(), False),
        pa.field("latent", pa.large_binary(), False),
        pa.field("latent_shape", pa.list_(pa.int32(), 3), False),
        pa.field("original_height", pa.int32(), False),
        pa.field("original_width", pa.int32(), False),
        pa.field("crop_top", pa.int32(), False),
        pa.field("crop_left", pa.int32(), False),
        pa.field("crop_height", pa.int32(), False),
        pa.field("crop_width", pa.int32(), False),
        pa.field("flipped", pa.bool_(), False),
        pa.field("caption", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("extra", pa.string()),
        pa.field("content_sha256", pa.binary(32)),
        pa.field("phash", pa.uint64()),
    ]
)

REJECTS = pa.schema(
    [
        pa.field("unit", pa.int64(), False),
        pa.field("row", pa.int64(), False),
        pa.field("uri", pa.string(), False),
        pa.field("key", pa.string(), False),
        pa.field("outcome", pa.string(), False),  # "rejected" | "filtered"
        pa.field("reason", pa.string(), False),
        pa.field("message", pa.string()),
    ]
)


def pack_latents(latents: npt.NDArray[np.float32], dtype: str) -> list[bytes]:
    """One C-order byte string a row, from float32 [n, c, h, w], rounded to nearest even in `dtype`."""
    if dtype == "float16":
        packed = np.ascontiguousarray(latents, np.float32).astype("<f2")
    elif dtype == "bfloat16":
        bits = np.ascontiguousarray(latents, np.float32).view(np.uint32)
        packed = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    else:
        raise ValueError(f"latent dtype must be one of {LATENT_DTYPES}, not {dtype!r}")
    return [row.tobytes() for row in packed]


def latents_from(
    column: pa.ChunkedArray | pa.Array, shape: tuple[int, int, int], dtype: str
) -> npt.NDArray[np.float32]:
    """float32 [n, c, h, w] from a latent column of rows of one `shape`; ValueError when bytes do not fit."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    size = 2 * math.prod(shape)
    parts: list[npt.NDArray[np.uint8]] = []
    for chunk in chunks:
        if not len(chunk):
            continue
        # The value bytes without a copy: they lie one after the other where every value has the same length.
        wide = pa.types.is_large_binary(chunk.type)
        offsets = np.frombuffer(chunk.buffers()[1], np.int64 if wide else np.int32, len(chunk) + 1 + chunk.offset)
        offsets = offsets[chunk.offset :]
        if chunk.null_count or not np.array_equal(np.diff(offsets), np.full(len(chunk), size)):
            raise ValueError(f"every latent of this row group must be {size} bytes long")
        parts.append(np.frombuffer(chunk.buffers()[2], np.uint8)[offsets[0] : offsets[-1]])
    if not parts:
        return np.zeros((0, *shape), np.float32)
    raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return to_float32(raw, dtype).reshape(-1, *shape)


def to_float32(raw: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Flat little-endian 2-byte values as float32."""
    if dtype == "float16":
        return raw.view("<f2").astype(np.float32)
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    raise ValueError(f"latent dtype must be one of {LATENT_DTYPES}, not {dtype!r}")
