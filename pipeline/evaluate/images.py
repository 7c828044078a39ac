"""The images that are compared, in batches of one size: real ones, decoded as for encoding, and samples.

Where not all real images are looked at, those are whose addresses hash lowest. A row's hash knows only its own
address, so the subset is the same on every run, takes from all of a sorted listing alike, and one subset holds every
smaller one. Memory is that of the hashes kept, whatever the source's size.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.media.images import caption_of, decode_image
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.pixels.prepare import PreparedImage, Reject, prepare
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import EndOfUnit, Entry, SourceRow
from pipeline.store.ledger.layout import canonical_json
from pipeline.store.read.dataset import Dataset, read_outside
from pipeline.store.tables import reading_table

ENTRIES_AT_ONCE = 256
ROUNDS = 16
_NO_ROW = 1 << 62  # rows from here on: none, but a reader says how many there were
_MOST_RANGES = 256
SAMPLE_COLUMNS = (
    "sample_id",
    "image",
    "file",
    "label",
    "prompt",
    "seed",
    "steps",
    "guidance",
    "sampler",
    "run_seed",
)
SAMPLE_SETTINGS = ("sampler", "steps", "guidance", "run_seed")


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
        version = entry.etag or entry.mtime_ns  # what tells a replaced object without reading it
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


@lru_cache(maxsize=1 << 16)
def rows_in(source: SourceConfig, entry: Entry) -> int:
    """Rows of an entry; of a tar as its headers tell, payloads passed over where the store can seek."""
    if entry.row_stop is not None:
        return entry.row_stop - entry.row_start
    return sum(row.rows for row in read_unit(source, [entry], [(_NO_ROW, None)]) if isinstance(row, EndOfUnit))


def threshold(source: SourceConfig, count: int, above: int = -1) -> int | None:
    """The largest of the `count` smallest hashes over `above`; None when there are no more than `count`."""
    kept: list[int] = []  # a heap of negated hashes: the largest of the smallest is on top
    over = 0
    for value in (row_hash(entry, row) for entry in list_entries(source) for row in range(rows_in(source, entry))):
        if value <= above:
            continue
        over += 1
        if len(kept) < count:
            heapq.heappush(kept, -value)
        elif value < -kept[0]:
            heapq.heapreplace(kept, -value)
    return -kept[0] if over > count else None


def row_hash(entry: Entry, row: int) -> int:
    """Uniform on 0 .. 2^64 - 1: the hash of the address of an entry's `row`-th row."""
    address = f"{entry.key}\0{entry.row_start + row}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(b"reference\0" + address, digest_size=8).digest(), "big")


def chosen_rows(source: SourceConfig, entries: Iterable[Entry], above: int, upto: int | None) -> list[int]:
    """Ascending rows of the concatenated entries whose hashes lie over `above` and not over `upto` (None: any)."""
    chosen: list[int] = []
    base = 0
    for entry in entries:
        num_rows = rows_in(source, entry)
        for row in range(num_rows):
            value = row_hash(entry, row)
            if above < value and (upto is None or value <= upto):
                chosen.append(base + row)
        base += num_rows
    return chosen


def ranges_over(rows: Sequence[int], most: int = _MOST_RANGES) -> list[tuple[int, int | None]]:
    """At most `most` half-open ranges that hold all of the ascending `rows`; the widest gaps stay out."""
    gaps = [(after - before, i) for i, (before, after) in enumerate(pairwise(rows), 1)]
    cuts = sorted(i for width, i in heapq.nlargest(most - 1, gaps) if width > 1)
    edges = [0, *cuts, len(rows)]
    return [(rows[start], rows[stop - 1] + 1) for start, stop in pairwise(edges) if rows]


@dataclass(frozen=True)
class SampleBatch:
    """Samples of one size: ids (16 bytes each), pixels uint8 [n,h,w,3], labels asked for, encoded bytes,
    captions.

    `settings` are the distinct (name, value) pairs of how they were drawn.
    """

    ids: tuple[bytes, ...]
    images_NHWC: npt.NDArray[np.uint8]
    labels: tuple[int | None, ...]
    captions: tuple[str, ...]
    prompts: tuple[str | None, ...]
    encoded: tuple[bytes, ...]
    settings: frozenset[tuple[str, Any]]


def open_samples(uri: str) -> Dataset:
    """The sample job's output.

    InputError when there is none, it is of another kind, or nothing is in it yet.
    """
    samples: Dataset = Dataset.open_kind(uri, "images", "samples.uri")
    if samples.num_rows == 0:
        raise InputError(
            f"There are no images at {uri} yet",
            key="samples.uri",
            value=uri,
            next_step="run the sample job to its end first",
        )
    return samples


def sample_batches(samples: Dataset, batch_size: int) -> Iterator[SampleBatch]:
    """Every visible sample once.

    Memory is bounded by one row group of encoded images and one batch of pixels.
    """
    for group in samples.row_groups:
        table = samples.read(group.index, SAMPLE_COLUMNS)
        for start in range(0, table.num_rows, batch_size):
            rows: list[dict[str, Any]] = table.slice(start, batch_size).to_pylist()
            with reading_table(samples.root.uri_of(group.file)):
                encoded = [row["image"] or read_outside(samples.root, row["file"]) for row in rows]
                images_NHWC = np.stack([decode_image(data) for data in encoded])
            yield SampleBatch(
                ids=tuple(row["sample_id"] for row in rows),
                images_NHWC=images_NHWC,
                labels=tuple(row["label"] for row in rows),
                captions=tuple(caption_of(row) for row in rows),
                prompts=tuple(row["prompt"] for row in rows),
                encoded=tuple(encoded),
                settings=frozenset(
                    (key, row[key]) for row in rows for key in SAMPLE_SETTINGS if row[key] is not None
                ),
            )
