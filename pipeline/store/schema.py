"""Arrow schemas of the rows in a dataset, the way from their columns to numpy, and which of them are held out."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
    for chunk in filter(len, chunks):
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


def fixed_bytes(array: pa.Array, width: int) -> npt.NDArray[np.uint8]:
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


def binary_rows(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.uint8]:
    """`fixed_bytes` of a column, which is copied only when it came in several chunks."""
    parts = [fixed_bytes(chunk, width) for chunk in column.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, width), np.uint8), *parts])


def keyed_words(words: npt.NDArray[np.uint64], *keys: int | npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Words that look random and depend on nothing but those given, distinct for distinct ones: uint64 [n].

    The finaliser of SplitMix64 (Steele et al. 2014) for each key: every output bit depends on every input bit.
    """
    for key in keys:
        words = words + np.asarray(key, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words = words ^ (words >> np.uint64(31))
    return words


# -- Training and held-out rows, told apart by a hash of the image's content alone -----------------------------
#
# A row's side depends on the SHA-256 of its stored image file (`content_sha256`) and on nothing else: not on the
# seed, on its place, on compaction or on rows added later, so a held-out image stays held out for as long as the
# dataset lives. All rows of one image are on one side: its mirrored variant, its other resolutions, a copy under
# another name, and the same file in another dataset of a mixture. By the sample id, which tells them apart, most
# held-out images would be trained on in another form. A row without the hash goes by its sample id.
#
# The order, however, must know how many rows of each row group are on either side, and hashes are inside the files.
# So every commit tells for each row group how many rows it holds out at the usual shares. For another share, and for
# row groups of which some rows are dead or which an earlier release wrote, two columns are read, 48 bytes a row.
# Choosing by place in the manifest instead would need neither, but would leak held-out rows into training whenever
# the data are compacted or re-planned.

RULE = "content 1"  # part of a stream's state; where a row's side changes, this does, and `held` of row groups too
SIDE_COLUMNS = ("sample_id", "content_sha256")
USUAL_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def id_words(ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """16-byte ids uint8 [n, 16] as little-endian words uint64 [n, 2]."""
    return np.ascontiguousarray(ids).view("<u8")


def image_words(table: pa.Table) -> npt.NDArray[np.uint64]:
    """What tells the images of rows with SIDE_COLUMNS apart, uint64 [n, 2]; ValueError for another width."""
    contents = table.column("content_sha256")
    if not contents.null_count:
        return _first_words(contents)
    known = ~np.asarray(contents.is_null().to_numpy())
    words = id_words(binary_rows(table.column("sample_id"), 16)).copy()
    words[known] = _first_words(pc.drop_null(contents))
    return words


def _first_words(contents: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    return binary_rows(contents, 32).view("<u8")[:, :2]


def held_out(images: npt.NDArray[np.uint64], share: float | npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Whether each image, as `image_words` gives them, is of the `share` that is kept out of training: bool [n].

    share: one, or several as [m, 1]: bool [m, n].
    """
    mixed = keyed_words(images[:, 0] ^ keyed_words(images[:, 1] ^ np.uint64(0x6C6F6F6D_73706C74), 0), 0)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share)


def usually_held_out(table: pa.Table) -> tuple[int, ...]:
    """How many rows of a table with SIDE_COLUMNS each of USUAL_SHARES keeps out of training."""
    return tuple(held_out(image_words(table), np.array(USUAL_SHARES)[:, None]).sum(axis=1).tolist())
