"""The real images.

Decoded by the policy that encoding uses, in batches of one size, and a digest of all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.listing import list_entries
from pipeline.source.prepare import Reject, prepare
from pipeline.source.readers import read_unit
from pipeline.source.rows import SourceRow
from pipeline.store.layout import canonical_json

ENTRIES_AT_ONCE = 256


@dataclass(frozen=True)
class ReferenceBatch:
    """Real images of one size: keys, sample ids (16 bytes), pixels uint8 [n,h,w,3], labels where known."""

    keys: tuple[str, ...]
    ids: tuple[bytes, ...]
    images_NHWC: npt.NDArray[np.uint8]
    labels: tuple[int | None, ...]


@dataclass(frozen=True)
class ReferenceSummary:
    """What listing alone tells.

    A digest of every entry, and the number of rows (None where only reading tells).
    """

    digest: str
    entries: int
    rows: int | None


def summarize(source: SourceConfig) -> ReferenceSummary:
    """Lists the source without reading an image; InputError when it is missing or empty."""
    state, entries, rows = hashlib.blake2b(digest_size=16), 0, 0
    unknown = False
    for entry in list_entries(source):
        version = entry.etag or entry.mtime_ns
        state.update(
            canonical_json([entry.key, entry.size_bytes, version, entry.row_start, entry.row_stop, entry.meta])
        )
        entries += 1
        unknown = unknown or entry.row_stop is None
        rows += (entry.row_stop or 0) - entry.row_start if entry.row_stop is not None else 0
    return ReferenceSummary(state.hexdigest(), entries, None if unknown else rows)


def reference_batches(
    source: SourceConfig, image: ImageConfig, *, batch_size: int, limit: int, total: int | None
) -> Iterator[ReferenceBatch]:
    """At most `limit` images, in listing order; images that the decode policy refuses are passed over.

    When `total` rows are known to be more than `limit`, the images are spread over all of them by hash of
    their keys. InputError when no image at all can be decoded.
    """
    share = 1.0 if total is None else (limit + 4 * limit**0.5) / max(total, 1)  # four sigma to spare
    waiting: dict[tuple[int, ...], list[tuple[SourceRow, bytes, npt.NDArray[np.uint8]]]] = {}
    taken = 0
    for row in _rows(source):
        if taken == limit:
            break
        if share < 1.0 and not _chosen(row.key, share):
            continue
        prepared = prepare(row, image)
        if isinstance(prepared, Reject):
            continue
        first = prepared[0]
        taken += 1
        group = waiting.setdefault(first.pixels.shape, [])
        group.append((row, first.sample_id, first.pixels))
        if len(group) == batch_size:
            yield _batch(waiting.pop(first.pixels.shape))
    for group in waiting.values():
        yield _batch(group)
    if taken == 0:
        raise InputError(
            f"No image of {source.uri} can be decoded",
            key="reference.uri",
            value=source.uri,
            rule="the reference holds images that the decode policy accepts",
            next_step="look at the formats and limits under image:",
        )


def _rows(source: SourceConfig) -> Iterator[SourceRow]:
    entries = iter(list_entries(source))
    while chunk := list(islice(entries, ENTRIES_AT_ONCE)):
        for row in read_unit(source, chunk, [(0, None)]):
            if isinstance(row, SourceRow):
                yield row


def _chosen(key: str, share: float) -> bool:
    word = hashlib.blake2b(b"reference\0" + key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(word, "big") < share * 2**64


def _batch(group: list[tuple[SourceRow, bytes, npt.NDArray[np.uint8]]]) -> ReferenceBatch:
    return ReferenceBatch(
        keys=tuple(row.key for row, _, _ in group),
        ids=tuple(identity for _, identity, _ in group),
        images_NHWC=np.stack([pixels for _, _, pixels in group]),
        labels=tuple(row.label for row, _, _ in group),
    )
