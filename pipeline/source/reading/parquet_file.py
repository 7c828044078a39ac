"""What is inside one Parquet file, given a way to read its bytes: the sizes of its row groups, and its rows.

    footer --layout--> [(rows, stored bytes) of each row group]      row groups --rows--> SourceRow, or (row, URI)

Nothing a file says about itself is believed further than its bytes reach, damage inside a row group costs that row
group alone, and everything that reads through a failing store raises that store's error. Memory is that of one page
of each column, as stored and unpacked, and of a batch of rows: `parquet` runs this under a limit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError, PipelineError
from pipeline.source.config import ParquetSource
from pipeline.source.reading.filters import filter_columns, to_arrow
from pipeline.source.reading.rows import (
    FAILED_STATUSES,
    MAX_STORED_BYTES,
    Ranges,
    SourceRow,
    canonical,
    orientation_of,
    parse_caption,
    parse_label,
    pick_extra,
)
from pipeline.source.reasons import Reason
from pipeline.storage.stores import RangedFile

Item = SourceRow | tuple[SourceRow, str]  # with a URI: the image is elsewhere

_BATCH_ROWS = 32
_CELL_ROWS = 128
_FREE_CELLS = 1 << 24  # more cells than these need a stored byte each to be believed
_BUFFER_BYTES = 8 << 20  # of each column: a row group is never held as a whole
_FREE_ROWS = 1 << 20  # more rows than this need a stored byte each to be believed
_MAX_URI = 8192


class TableError(Exception):
    """The file, or what is left of it, cannot be read; says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message[:500]


@dataclass(frozen=True)
class Span:
    """Rows row_start..row_stop of a file, which are rows from `base` on in their unit; `ranges` are of the unit."""

    key: str
    row_start: int
    row_stop: int
    base: int
    ranges: tuple[tuple[int, int | None], ...]

    def row_of(self, file_row: int) -> int:
        """The unit's number of one of the file's rows."""
        return self.base + file_row - self.row_start


def layout(file: RangedFile, source: ParquetSource, where: str) -> list[tuple[int, int]]:
    """(rows, stored bytes) of each row group.

    InputError when a sound file lacks what the configuration names; TableError for a damaged or lying one.
    """
    with _opened(file) as parquet:
        _columns(parquet.schema_arrow, source, where)
        return _groups(parquet, file.size)


def rows(file: RangedFile, source: ParquetSource, where: str, span: Span) -> Iterator[Item]:
    """The wanted rows of a span in order; a damaged row group gives rejected rows, those after it are read."""
    wanted = Ranges(span.ranges)
    with _opened(file) as parquet:
        columns, first = _columns(parquet.schema_arrow, source, where), 0
        for group, (count, _) in enumerate(_groups(parquet, file.size)):
            inside = span.row_start <= first < span.row_stop
            if inside and wanted.meets(span.row_of(first), span.row_of(first + count)):
                yield from _group(file, parquet, group, range(first, first + count), columns, source, span, wanted)
            first += count


def cells(file: RangedFile, max_rows: int, max_bytes: int) -> Iterator[tuple[dict[str, Any], int]]:
    """All cells, some rows at a time: of each column the JSON of its distinct values, and the place of each row's.

    Bytes are hexadecimal digits, other values that JSON does not know are their text. TableError for a damaged file,
    or one of more rows, or of more bytes as such JSON, than it may have.
    """
    with _opened(file) as parquet:
        rows, width = sum(count for count, _ in _groups(parquet, file.size)), len(parquet.schema_arrow)
        if rows > max_rows or rows * width > max(_FREE_CELLS, file.size):
            raise TableError(
                Reason.CORRUPT_CONTAINER,
                f"{rows:,} rows of {width:,} columns, more than {max_rows:,} rows or than its size makes likely",
            )
        texts = [
            f.name for f in parquet.schema_arrow if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
        ]
    with _opened(file, read_dictionary=texts) as parquet:
        try:
            for batch in parquet.iter_batches(_CELL_ROWS, use_threads=False):
                columns = {name: _distinct(batch.column(name)) for name in batch.schema.names}
                max_bytes -= sum(len(values) for values, _ in columns.values())
                if max_bytes < 0:
                    break
                yield columns, batch.num_rows
        except Exception as error:  # noqa: BLE001 - hostile bytes raise anything
            raise _damage(file, error) from None
    if max_bytes < 0:
        raise TableError(Reason.CORRUPT_CONTAINER, "it unpacks to more bytes than it may")


def _distinct(column: Any) -> tuple[str, list[int]]:
    """(the JSON of values, the place of each row's among them); of a text that repeats there is one."""
    if not pa.types.is_dictionary(column.type):
        shown = json.dumps(column.to_pylist(), default=lambda v: v.hex() if isinstance(v, bytes) else str(v))
        return shown, list(range(len(column)))
    used = column.indices.unique().drop_null()
    places = pc.index_in(column.indices, used).fill_null(len(used)).to_pylist()
    return json.dumps([*column.dictionary.take(used).to_pylist(), None]), places


def _opened(file: RangedFile, read_dictionary: list[str] | None = None) -> Any:
    try:
        return pq.ParquetFile(
            file,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
            read_dictionary=read_dictionary,
        )
    except Exception as error:  # noqa: BLE001 - as below
        raise _damage(file, error) from None


def _damage(file: RangedFile, error: Exception) -> Exception:
    """What an exception out of Arrow means: the store's own error where reading failed, else a TableError."""
    if file.failed is not None:
        return file.failed
    if isinstance(error, MemoryError):
        return TableError(Reason.DECODE_MEMORY, f"reading it needs too much memory: {_one_line(error)}")
    return TableError(Reason.CORRUPT_CONTAINER, _one_line(error))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _groups(parquet: Any, size_bytes: int) -> list[tuple[int, int]]:
    """Rows and stored bytes of each row group; TableError when the footer claims what the file cannot hold."""
    footer = parquet.metadata
    groups: list[tuple[int, int]] = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        sizes = [group.column(c).total_compressed_size for c in range(group.num_columns)]
        # A negative size must not hide behind the others: it alone stands for the group.
        groups.append((group.num_rows, min(sizes) if any(size < 0 for size in sizes) else sum(sizes)))
    claimed, stored = sum(n for n, _ in groups), sum(size for _, size in groups)
    least = min((min(pair) for pair in groups), default=0)
    if least < 0 or stored > size_bytes or claimed > max(_FREE_ROWS, size_bytes):
        message = f"the footer claims {claimed} rows in {stored} bytes, the file has {size_bytes} bytes"
        raise TableError(Reason.CORRUPT_CONTAINER, message)
    return groups


def _group(
    file: RangedFile,
    parquet: Any,
    group: int,
    file_rows: range,
    columns: list[str],
    source: ParquetSource,
    span: Span,
    wanted: Ranges,
) -> Iterator[Item]:
    at = file_rows.start
    try:
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
            kept: set[int] | None = None
            if source.filter is not None:
                names = [name for name in batch.schema.names if name in filter_columns(source.filter)]
                numbers = pa.array(range(batch.num_rows))
                table = pa.Table.from_batches([batch.select(names)]).append_column("#", numbers)
                kept = set(table.filter(to_arrow(source.filter)).column("#").to_pylist())
            for index in range(min(batch.num_rows, file_rows.stop - at)):
                if at < span.row_stop and span.row_of(at) in wanted:
                    keep = kept is None or index in kept
                    yield _to_row(batch, index, source, span.row_of(at), f"{span.key}#{at}", keep)
                at += 1
        problem: Exception = TableError(Reason.CORRUPT_CONTAINER, "the row group holds fewer rows than it claims")
    except PipelineError:
        raise
    except Exception as error:  # noqa: BLE001 - hostile bytes raise anything; each lost row is accounted for
        problem = _damage(file, error)
    if not isinstance(problem, TableError):
        raise problem
    for lost in range(at, min(file_rows.stop, span.row_stop)):
        if span.row_of(lost) in wanted:
            key = f"{span.key}#{lost}"
            yield SourceRow.without_image(span.row_of(lost), key, problem.reason, problem.message, source.name)


def _to_row(batch: Any, index: int, source: ParquetSource, row: int, key: str, kept: bool) -> Item:
    def without(reason: Reason, message: str) -> SourceRow:
        return SourceRow.without_image(row, key, reason, message, source.name)

    try:
        names = [name for name in batch.schema.names if name != source.image]
        record = {name: batch.column(name)[index].as_py() for name in names}
        status = record.get(source.status) if source.status else None
        if status in FAILED_STATUSES:
            return without(Reason.SOURCE_STATUS, f"{source.status} is {status!r:.100}")
        if not kept:
            return without(Reason.ROW_FILTER, f"not kept by {source.filter}")
        caption = parse_caption(record.get(source.caption)) if source.caption else None
        label = parse_label(record.get(source.label), source.classes) if source.label else None
        extra = pick_extra(record, source.extra, source.caption, (source.image, source.label))
        extra = {k: v for k, v in extra.items() if not isinstance(v, bytes)}
        out = SourceRow(
            row, key, None, caption, label, canonical(extra, MAX_STORED_BYTES) if extra else None, source=source.name
        )
        out.exif_orientation = orientation_of(record.get(source.exif)) if source.exif else None
        image = batch.column(source.image)[index].as_py()
    except (ValueError, OverflowError) as error:  # text that is no UTF-8, times beyond the calendar, ...
        return without(Reason.BAD_METADATA, str(error))
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if image is None:
        return without(Reason.NO_IMAGE, f"{source.image} is null")
    if isinstance(image, str):
        return (out, image) if len(image) <= _MAX_URI else without(Reason.URI_REFUSED, f"{len(image)} characters")
    if len(image) > source.max_bytes:
        return without(Reason.TOO_MANY_BYTES, f"{len(image)} bytes, over source.max_bytes {source.max_bytes}")
    out.image = image
    return out


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
                key=key,
                value=name,
                rule=f"its columns are {', '.join(schema.names)[:400]}",
                next_step="correct the name",
            )
    kind = schema.field(source.image).type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    is_struct = (
        pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    )
    if not (_is_bytes(kind) or is_text or is_struct or pa.types.is_null(kind)):
        raise InputError(
            f"Column {source.image!r} of {where} holds {kind}, which is no image",
            key="image",
            value=source.image,
            rule="an image column is binary, a struct of bytes and path, or text with URIs",
            next_step="name another column",
        )
    _check_filter(schema, source, where)
    if "*" in source.extra:
        return list(schema.names)
    wanted = {name for _, name in asked} | {name for _, name in optional if name}
    return [name for name in schema.names if name in wanted]


def _check_filter(schema: Any, source: ParquetSource, where: str) -> None:
    if source.filter is None:
        return
    used = pa.schema([schema.field(name) for name in sorted(filter_columns(source.filter))])
    try:
        used.empty_table().filter(to_arrow(source.filter))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(
            f"The filter does not fit the columns of {where}: {' '.join(str(error).split())[:200]}",
            key="filter",
            value=source.filter,
            rule=f"they are {', '.join(f'{f.name}: {f.type}' for f in used)[:400]}",
            next_step="compare numbers with numbers and text with text",
        ) from None


def _is_bytes(kind: Any) -> bool:
    plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return bool(plain or pa.types.is_binary_view(kind))
