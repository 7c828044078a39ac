"""The rows of a unit: its entries one after the other, only the rows asked for, each as bytes or as a reason.

No damaged or missing object raises: it ends as rejected rows. Where a unit's length was unknown and its end was
reached, `EndOfUnit` comes last and says how many rows there were. Of an object that is no longer the listed version
no row comes, and no end: what another version holds must not count as the listed one's; the next listing plans it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from pipeline.source.config import FolderSource, ParquetSource, SourceConfig, WebDatasetSource
from pipeline.source.reading.fields import FAILED_STATUSES, MAX_TEXT_BYTES, canonical, parse_object
from pipeline.source.reading.filters import keeps
from pipeline.source.reading.listing import source_root
from pipeline.source.reading.metadata import FILTERED, PROBLEM, TEXTS, picked
from pipeline.source.reading.parquet import read_parquets
from pipeline.source.reading.rows import EndOfUnit, Entry, Failure, Ranges, SourceRow, fetch, map_ahead
from pipeline.source.reading.webdataset import read_tars
from pipeline.source.reasons import Reason
from pipeline.storage.errors import ObjectChanged
from pipeline.storage.root import ObjectInfo, Root

_log = logging.getLogger(__name__)


def read_unit(
    source: SourceConfig, entries: Sequence[Entry], ranges: Sequence[tuple[int, int | None]]
) -> Iterator[SourceRow | EndOfUnit]:
    """Rows of the concatenated entries inside the half-open ranges (a stop of None is the unit's end), in order."""
    wanted, root = Ranges(ranges), _root(source)
    if isinstance(source, FolderSource):
        yield from _read_folder(root, source, entries, wanted)
    elif isinstance(source, WebDatasetSource):
        yield from read_tars(root, source, entries, wanted)
    else:
        assert isinstance(source, ParquetSource)

        yield from read_parquets(root, source, entries, wanted)


@lru_cache(maxsize=16)
def _root(source: SourceConfig) -> Root:
    return source_root(source)  # asks the store once per process, not once per unit


def _read_folder(root: Root, source: FolderSource, entries: Sequence[Entry], wanted: Ranges) -> Iterator[SourceRow]:
    def read(item: tuple[int, Entry]) -> SourceRow | None:
        row, entry = item
        fields = parse_object(entry.meta) if entry.meta is not None else {}
        try:
            found = _beside(root, source, fields)
            data = found or fetch(root, entry.key, source.max_bytes, entry.size_bytes, entry, links=source.links)
        except ObjectChanged as error:
            _log.warning("%s", error)
            return None
        if isinstance(data, Failure):
            return SourceRow.without_image(row, entry.key, data.reason, data.message, source.name)
        extra = canonical(fields["extra"]) if fields.get("extra") else None
        return SourceRow(row, entry.key, data, fields.get("caption"), fields.get("label"), extra, source=source.name)

    chosen = ((row, entry) for row, entry in enumerate(entries) if row in wanted)
    rows = map_ahead(read, chosen, 1 if root.local_path() is not None else source.read_ahead)
    yield from (row for row in rows if row is not None)


def _beside(root: Root, source: FolderSource, fields: dict[str, Any]) -> Failure | None:
    """Complete what metadata say of an image by the texts beside it; why it is no row, where they say so."""
    if PROBLEM in fields:
        return Failure(Reason.BAD_METADATA, fields[PROBLEM])
    record: dict[str, Any] = {}
    captions = {}
    for key, size_bytes, etag, mtime_ns in fields.get(TEXTS, ()):
        version = ObjectInfo(key, size_bytes, etag, mtime_ns)
        text = fetch(root, key, MAX_TEXT_BYTES, size_bytes, version, links=source.links)
        if isinstance(text, Failure):
            return Failure(Reason.BAD_METADATA, f"{key}: {text.message}")
        try:
            if key.lower().endswith(".json"):
                record = parse_object(text)
            else:
                captions[key] = text.decode("utf-8-sig").strip()
        except ValueError as error:
            return Failure(Reason.BAD_METADATA, f"{key}: {error}")
    if TEXTS not in fields:
        return Failure(Reason.ROW_FILTER, f"not kept by {source.filter}") if fields.get(FILTERED) else None
    if source.status and record.get(source.status) in FAILED_STATUSES:
        return Failure(Reason.SOURCE_STATUS, f"{source.status} is {record[source.status]!r}")
    if captions and source.caption:
        record[source.caption] = next(iter(captions.values()))
    try:
        own = picked(source, record)
        kept = source.filter is None or keeps(source.filter, {**(fields.get("extra") or {}), **record})
    except ValueError as error:
        return Failure(Reason.BAD_METADATA, str(error))
    told = {caption for caption in (*captions.values(), fields.get("caption")) if caption}
    if len(told) > 1 and source.caption:
        return Failure(Reason.BAD_METADATA, f"two captions: {' and '.join(repr(c[:60]) for c in sorted(told))}")
    for name, value in own.items():
        fields[name] = fields.get(name) or value
    return None if kept else Failure(Reason.ROW_FILTER, f"not kept by {source.filter}")
