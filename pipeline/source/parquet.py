"""Rows out of Parquet files: image bytes, the {bytes, path} struct of Hugging Face datasets, or URIs of images.

    footer -> spans of row groups (the plan)      span -> batches of the needed columns -> filter -> rows

A row's key is "file.parquet#row number in the file". Only needed columns and wanted row groups are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, PipelineError
from pipeline.source.config import ParquetSource
from pipeline.source.fields import canonical, orientation_of, parse_caption, parse_label, pick_extra
from pipeline.source.filters import filter_columns, to_arrow
from pipeline.source.listing import Entry
from pipeline.source.ranges import Ranges
from pipeline.source.reasons import Reason
from pipeline.source.remote import Failure, failure_of, map_ahead, open_file
from pipeline.source.rows import EndOfUnit, SourceRow
from pipeline.source.uris import UriReader
from pipeline.storage import ObjectInfo, Root

_SPAN_ROWS, _SPAN_BYTES = 10_000, 256 << 20
_BATCH_ROWS = 32


def spans(root: Root, info: ObjectInfo, source: ParquetSource) -> Iterator[tuple[int, int | None, int]]:
    """(first row, row after the last, stored bytes) of runs of row groups; (0, None, size) for a damaged file.

    InputError when a sound file lacks a column that the configuration names.
    """
    try:
        with open_file(root, info.key, info.size_bytes) as file, _open(file) as parquet:
            _columns(parquet.schema_arrow, source, root.uri_of(info.key))
            footer = parquet.metadata
            groups = [
                (footer.row_group(g).num_rows, _stored_bytes(footer.row_group(g)))
                for g in range(footer.num_row_groups)
            ]
    except PipelineError:
        raise
    except (pa.ArrowException, OSError, ValueError):
        yield 0, None, info.size_bytes
        return
    start, rows, size = 0, 0, 0
    for group_rows, group_bytes in groups:
        if rows and (rows + group_rows > _SPAN_ROWS or size + group_bytes > _SPAN_BYTES):
            yield start, start + rows, size
            start, rows, size = start + rows, 0, 0
        rows, size = rows + group_rows, size + group_bytes
    if rows:
        yield start, start + rows, size


def read_parquets(
    root: Root, source: ParquetSource, entries: Sequence[Entry], wanted: Ranges
) -> Iterator[SourceRow | EndOfUnit]:
    """Rows of the spans one after the other; a damaged file of unknown length is one rejected row."""
    uris, base, unknown = UriReader(root, source.uri_prefixes, source.max_bytes), 0, False
    for entry in entries:
        unknown = unknown or entry.row_stop is None
        length = 1 if entry.row_stop is None else entry.row_stop - entry.row_start
        if wanted.meets(base, base + length):
            window = source.read_ahead if source.uri_prefixes or root.local_path() is None else 1
            rows = _read_span(root, source, entry, base, wanted)
            yield from map_ahead(
                lambda item: item if isinstance(item, SourceRow) else _resolve(item, uris), rows, window
            )
        base += length
    if unknown and wanted.open_ended:
        yield EndOfUnit(base)


def _read_span(
    root: Root, source: ParquetSource, entry: Entry, base: int, wanted: Ranges
) -> Iterator[SourceRow | tuple[SourceRow, str]]:
    """The wanted rows of one entry; a row whose image is elsewhere comes as (row, URI)."""
    done = base
    try:
        for item in _rows(root, source, entry, base, wanted):
            yield item
            done = (item if isinstance(item, SourceRow) else item[0]).row + 1
        return
    except PipelineError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowSerializationError) as error:
        failure = Failure(Reason.CORRUPT_CONTAINER, f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 - stores raise anything; each lost row is accounted for
        # Arrow reports damage (a page checksum, a bad header) as a bare OSError; those of a store have a number.
        damaged = type(error) is OSError and error.errno is None
        failure = Failure(Reason.CORRUPT_CONTAINER, str(error)) if damaged else failure_of(error)
    length = 1 if entry.row_stop is None else entry.row_stop - entry.row_start
    for row in range(done, base + length):
        if row in wanted:
            key = f"{entry.key}#{entry.row_start + row - base}"
            yield SourceRow.without_image(row, key, failure.reason, failure.message, source.name)


def _rows(
    root: Root, source: ParquetSource, entry: Entry, base: int, wanted: Ranges
) -> Iterator[SourceRow | tuple[SourceRow, str]]:
    size = root.info(entry.key).size_bytes if root.local_path() is None else 0
    with open_file(root, entry.key, size) as file, _open(file) as parquet:
        if entry.row_stop is None:  # it was damaged when it was listed: whatever it holds now was not planned
            raise pa.ArrowInvalid("the file was not readable when it was listed; list the source again")
        columns = _columns(parquet.schema_arrow, source, root.uri_of(entry.key))
        first = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            start, stop = base + first - entry.row_start, base + first + count - entry.row_start
            inside = entry.row_start <= first < entry.row_stop
            if inside and wanted.meets(start, stop):
                batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)
                for batch in batches:
                    yield from _batch(batch, source, entry, start, first, wanted)
                    start, first = start + batch.num_rows, first + batch.num_rows
            else:
                first += count


def _open(file: BinaryIO) -> Any:
    return pq.ParquetFile(file, page_checksum_verification=True)


def _batch(
    batch: Any, source: ParquetSource, entry: Entry, row: int, file_row: int, wanted: Ranges
) -> Iterator[SourceRow | tuple[SourceRow, str]]:
    kept = _kept(batch, source.filter)
    for index, record in enumerate(batch.to_pylist()):
        if row + index in wanted:
            key = f"{entry.key}#{file_row + index}"
            yield _to_row(record, source, row + index, key, kept is None or index in kept)


def _kept(batch: Any, text: str | None) -> set[int] | None:
    if text is None:
        return None
    names = [name for name in batch.schema.names if name in filter_columns(text)]
    table = pa.Table.from_batches([batch.select(names)]).append_column("#", pa.array(range(batch.num_rows)))
    return set(table.filter(to_arrow(text)).column("#").to_pylist())


def _to_row(
    record: dict[str, Any], source: ParquetSource, row: int, key: str, kept: bool
) -> SourceRow | tuple[SourceRow, str]:
    def without(reason: Reason, message: str) -> SourceRow:
        return SourceRow.without_image(row, key, reason, message, source.name)

    status = record.get(source.status) if source.status else None
    if isinstance(status, str) and status != "success":
        return without(Reason.SOURCE_STATUS, f"{source.status} is {status!r}")
    if not kept:
        return without(Reason.ROW_FILTER, f"not kept by {source.filter}")
    try:
        caption = parse_caption(record.get(source.caption)) if source.caption else None
        label = parse_label(record.get(source.label), source.classes) if source.label else None
    except ValueError as error:
        return without(Reason.BAD_METADATA, str(error))
    used = (source.image, source.caption, source.label)
    extra = {k: v for k, v in pick_extra(record, source.extra, used).items() if not isinstance(v, bytes)}
    out = SourceRow(row, key, None, caption, label, canonical(extra) if extra else None, source=source.name)
    out.exif_orientation = orientation_of(record.get(source.exif)) if source.exif else None
    image = record.get(source.image)
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image is None:
        return without(Reason.NO_IMAGE, f"{source.image} is null")
    if isinstance(image, str):
        return out, image
    if len(image) > source.max_bytes:
        return without(Reason.TOO_MANY_BYTES, f"{len(image)} bytes, over source.max_bytes {source.max_bytes}")
    out.image = image
    return out


def _resolve(item: tuple[SourceRow, str], uris: UriReader) -> SourceRow:
    row, uri = item
    data = uris.read(uri)
    if isinstance(data, Failure):
        return SourceRow.without_image(row.row, row.key, data.reason, data.message, row.source)
    row.image = data
    return row


def _columns(schema: Any, source: ParquetSource, where: str) -> list[str]:
    """The columns to read; InputError names those that are missing or of the wrong type."""
    names = set(schema.names)
    given = source.model_fields_set
    asked = [("image", source.image), *(("extra", e) for e in source.extra if e != "*")]
    # The default names of optional columns may be absent; names that somebody wrote down may not.
    optional = [(key, getattr(source, key)) for key in ("caption", "label", "status", "exif")]
    asked += [(key, name) for key, name in optional if name and key in given]
    asked += [("filter", name) for name in sorted(filter_columns(source.filter))] if source.filter else []
    for key, name in asked:
        if name not in names:
            raise InputError(
                f"{where} has no column {name!r}",
                key=f"source.{key}",
                value=name,
                rule=f"its columns are {', '.join(schema.names)[:400]}",
                next_step="correct the name",
            )
    kind = schema.field(source.image).type
    if not (_is_bytes(kind) or _is_text(kind) or _is_struct(kind) or pa.types.is_null(kind)):
        raise InputError(
            f"Column {source.image!r} of {where} holds {kind}, which is no image",
            key="source.image",
            value=source.image,
            rule="an image column is binary, a struct of bytes and path, or text with URIs",
            next_step="name another column",
        )
    if "*" in source.extra:
        return list(schema.names)
    wanted = {name for _, name in asked} | {name for _, name in optional if name}
    return [name for name in schema.names if name in wanted]


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_struct(kind: Any) -> bool:
    return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _stored_bytes(group: Any) -> int:
    return sum(group.column(c).total_compressed_size for c in range(group.num_columns))
