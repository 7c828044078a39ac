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
from pipeline.evaluate.subset import chosen_rows, ranges_over, threshold
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.pixels.prepare import PreparedImage, Reject, prepare
from pipeline.source.reading.listing import list_entries
from pipeline.source.reading.readers import read_unit
from pipeline.source.reading.rows import SourceRow
from pipeline.store.ledger.layout import canonical_json

ENTRIES_AT_ONCE = 256
ROUNDS = 16


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
    """At most `limit` images; images that the decode policy refuses are passed over.

    Of more than `limit` rows those are taken whose addresses hash lowest, wherever they are listed. For refused ones
    the next by hash are taken, in up to ROUNDS passes over the listing: hence exactly `limit` images where the
    source has them, and fewer only where nearly all are refused. `total`: the number of rows, None when unknown.
    InputError when no image at all can be decoded.
    """
    rows = _rows(source, image) if total is not None and total <= limit else _subset(source, image, limit)
    waiting: dict[tuple[int, ...], list[tuple[SourceRow, bytes, npt.NDArray[np.uint8]]]] = {}
    taken = 0
    for row, first in rows:
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


def _subset(source: SourceConfig, image: ImageConfig, limit: int) -> Iterator[tuple[SourceRow, PreparedImage]]:
    """The decodable rows among those that hash lowest; for each refused one the next, round by round."""
    left, above = limit, -1
    for _ in range(ROUNDS):
        upto = threshold(source, left, above)
        for row in _rows(source, image, above, upto):
            left -= 1
            yield row
        if upto is None or left == 0:
            return
        above = upto


def _rows(
    source: SourceConfig, image: ImageConfig, above: int = -1, upto: int | None = None
) -> Iterator[tuple[SourceRow, PreparedImage]]:
    """Rows that the decode policy accepts, first variants only; of all hashes, or of those in (above, upto]."""
    every = above < 0 and upto is None
    entries = iter(list_entries(source))
    while chunk := list(islice(entries, ENTRIES_AT_ONCE)):
        chosen = [] if every else chosen_rows(source, chunk, above, upto)
        wanted = set(chosen)
        for row in read_unit(source, chunk, [(0, None)] if every else ranges_over(chosen)):
            if not isinstance(row, SourceRow) or not (every or row.row in wanted):
                continue
            prepared = prepare(row, image)
            if not isinstance(prepared, Reject):
                yield row, prepared[0]


def _batch(group: list[tuple[SourceRow, bytes, npt.NDArray[np.uint8]]]) -> ReferenceBatch:
    return ReferenceBatch(
        keys=tuple(row.key for row, _, _ in group),
        ids=tuple(identity for _, identity, _ in group),
        images_NHWC=np.stack([pixels for _, _, pixels in group]),
        labels=tuple(row.label for row, _, _ in group),
    )
