"""Training and held-out rows, told apart by a hash of the image's content alone.

A row's side depends on the SHA-256 of its stored image file (`content_sha256`) and on nothing else: not on the
seed, on its place, on compaction or on rows added later, so a held-out image stays held out for as long as the
dataset lives. All rows of one image are on one side: its mirrored variant, its other resolutions, a copy under
another name, and the same file in another dataset of a mixture. By the sample id, which tells them apart, most
held-out images would be trained on in another form. A row without the hash goes by its sample id.

The order, however, must know how many rows of each row group are on either side, and hashes are inside the files.
That needs one pass over two columns - 48 bytes a row, 680 times less than a latent of a 512 px image - whose
result, one count per row group, is kept under a name made from the layout's digest and the share, so that it
happens once per state of a dataset and not once per start or per rank. Choosing by place in the manifest instead
would need no pass, but would leak held-out rows into training whenever the data are compacted or re-planned.
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.stream.data import LatentRows, binary_rows, row_counts

if TYPE_CHECKING:
    from pipeline.storage.root import Root

RULE = "content 1"  # part of the cache's name and of a stream's state; changes when a row's side does
SIDE_COLUMNS = ("sample_id", "content_sha256")


def id_words(ids: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """16-byte ids uint8 [n, 16] as little-endian words uint64 [n, 2]."""
    return np.ascontiguousarray(ids).view("<u8")


def image_words(table: pa.Table) -> NDArray[np.uint64]:
    """What tells the images of rows with SIDE_COLUMNS apart, uint64 [n, 2]; ValueError for another width."""
    contents = table.column("content_sha256")
    if not contents.null_count:
        return _first_words(contents)
    known = ~np.asarray(contents.is_null().to_numpy())
    words = id_words(binary_rows(table.column("sample_id"), 16)).copy()
    words[known] = _first_words(pc.drop_null(contents))
    return words


def _first_words(contents: pa.ChunkedArray) -> NDArray[np.uint64]:
    return binary_rows(contents, 32).view("<u8")[:, :2]


def held_out(images: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Whether each image, as `image_words` gives them, is of the `share` that is kept out of training: bool [n]."""
    mixed = _mix(images[:, 0] ^ _mix(images[:, 1] ^ np.uint64(0x6C6F6F6D_73706C74)))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every output bit depends on every input bit."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def held_out_counts(
    dataset: LatentRows, share: float, *, cache: Root | None = None, threads: int = 4
) -> NDArray[np.int64]:
    """How many rows of each row group are held out: int64 [row groups].

    Reads SIDE_COLUMNS of every row group, unless `cache` already has the answer for these data and this
    share. A cached answer that is damaged or does not fit is made again.
    """
    name = hashlib.blake2b(repr((RULE, dataset.layout_digest, share)).encode(), digest_size=16).hexdigest()
    key = f"heldout-{name}.npy"
    limits = row_counts(dataset.row_groups)
    if cache is not None and cache.exists(key):
        cached = _parse(cache.read_bytes(key))
        if cached is not None and cached.shape == limits.shape and ((cached >= 0) & (cached <= limits)).all():
            return cached

    def count(row_group: int) -> int:
        images = image_words(dataset.read(row_group, SIDE_COLUMNS, verify=False))
        return int(np.count_nonzero(held_out(images, share)))

    with ThreadPoolExecutor(threads, thread_name_prefix="held-out") as pool:
        counts = np.fromiter(pool.map(count, range(len(limits))), np.int64, len(limits))
    if cache is not None:
        buffer = io.BytesIO()
        np.save(buffer, counts, allow_pickle=False)
        cache.put(key, buffer.getvalue())
    return counts


def _parse(data: bytes) -> NDArray[np.int64] | None:
    try:
        counts = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return None
    return counts if isinstance(counts, np.ndarray) and counts.dtype == np.int64 else None


def split_rows(
    dataset: LatentRows, share: float, split: str, *, cache: Root | None = None, threads: int = 4
) -> NDArray[np.int64] | None:
    """Rows of each row group on one side of the split; None when nothing is held out and all rows count."""
    if split not in ("train", "holdout"):
        raise ValueError(f"split is {split!r}; it is 'train' or 'holdout'")
    if share == 0.0:
        if split == "holdout":
            raise InputError(
                "no rows are held out", key="stream.holdout", value=share, next_step="set a share above 0"
            )
        return None
    counts = held_out_counts(dataset, share, cache=cache, threads=threads)
    if split == "holdout":
        return counts
    return row_counts(dataset.row_groups) - counts
