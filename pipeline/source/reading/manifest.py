"""Listings that somebody else made: manifests of objects, S3 Inventories as they come, the logs of Delta and Iceberg.

    manifest --files--> rows, in batches --in order? else sorted in runs on disk--> one entry a row

The keys of a whole bucket come with the bucket's name: what lies below `uri` is taken of them. Memory is that of a
batch, or of a run where rows must be sorted.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.config import need_package
from pipeline.errors import InputError, PipelineError
from pipeline.source.config import IMAGE_ENDINGS, ManifestSource, ParquetSource, TableConfig
from pipeline.source.reading.filters import filter_columns, keeps
from pipeline.source.reading.folder import PROBLEM
from pipeline.source.reading.rows import (
    FAILED_STATUSES,
    Entry,
    canonical,
    is_hidden,
    parse_caption,
    parse_label,
    pick_extra,
)
from pipeline.source.reading.text_file import FILTERED
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import CONTENT, ObjectInfo, Root, place_of

_log = logging.getLogger(__name__)
# What a column is called, letters and digits alone: by this project, by S3 Inventory in Parquet and in CSV.
_NAMES = {
    "key": ("key", "uri", "url"),
    "size": ("size", "sizebytes"),
    "etag": ("etag",),
    "modified": ("lastmodifieddate", "lastmodified", "mtime"),
    "bucket": ("bucket",),
    "latest": ("islatest",),
    "deleted": ("isdeletemarker",),
}
_COLUMNS = (
    "key (relative to source.uri, or a URI), size in bytes, etag or last_modified, and what caption, label and extra "
    "name"
)
_RUN_ROWS = 2_000_000  # sorted at a time, where a manifest is not in order
_BATCH_ROWS = 65_536
_ENDINGS = tuple(f".{ending}" for ending in IMAGE_ENDINGS)


@dataclass(frozen=True)
class ManifestFile:
    """A file of rows. columns: of a CSV without a header the names; encoded: keys are written as in URLs."""

    root: Root
    info: ObjectInfo
    columns: tuple[str, ...] = ()
    encoded: bool = False

    @property
    def uri(self) -> str:
        """Where it lies."""
        return self.root.uri_of(self.info.key)


def manifest_files(source: ManifestSource) -> list[ManifestFile]:
    """The files of a manifest, by name; InputError when there is none, or it is still being written."""
    place, name = place_of(source.manifest)
    with _reading(source.manifest):
        if name == "manifest.json":
            return _inventory(source, place)
        folder = Root(source.manifest)
        if folder.kind() != "directory":
            return [ManifestFile(place, place.info(name))]
        infos = list(folder.list())
        half = next((i.key for i in infos if i.key.startswith("_temporary/")), None)
        if half is not None:
            raise _refused(source.manifest, f"is still being written: it holds {half}", "wait for its writer to end")
        found = [i for i in infos if i.key.lower().endswith((".parquet", ".csv", ".csv.gz")) and not is_hidden(i.key)]
        if not found:
            raise _refused(source.manifest, "holds no .parquet, .csv or .csv.gz file", "name another folder or file")
        return [ManifestFile(folder, info) for info in found]


def _inventory(source: ManifestSource, place: Root) -> list[ManifestFile]:
    """The files of an S3 Inventory, of which the checksum is written last."""
    data = place.read_bytes("manifest.json")
    if not place.exists("manifest.checksum"):
        lacking = "is still being written: manifest.checksum is not there"
        raise _refused(source.manifest, lacking, "name the one of the day before")
    if place.read_bytes("manifest.checksum").decode().strip() != hashlib.md5(data, usedforsecurity=False).hexdigest():
        raise _refused(source.manifest, "is not the one of its manifest.checksum", "copy both again")
    told = json.loads(data)
    kind, columns = told["fileFormat"], tuple(name.strip() for name in told["fileSchema"].split(","))
    if kind not in ("Parquet", "CSV"):
        raise _refused(source.manifest, f"is written as {kind}", "have the inventory written as Parquet or CSV")
    # The files lie beside the folders of the days, whatever bucket a copy lies in.
    folder = Root(place.uri.rstrip("/").rpartition("/")[0]).child("data")
    files = []
    for file in told["files"]:
        info = folder.info(str(file["key"]).rpartition("/")[2])
        if info.size_bytes != int(file["size"]):
            found = f"has {info.size_bytes:,} bytes, not {file['size']:,}"
            raise _refused(folder.uri_of(info.key), found, "copy it again")
        files.append(ManifestFile(folder, info, columns if kind == "CSV" else (), encoded=kind == "CSV"))
    return files


def list_manifest(root: Root, source: ManifestSource) -> Iterator[Entry]:
    """An entry for each object below a root that a manifest names, ascending by key.

    InputError for a column that is missing, a row without a key or size, a key that comes twice, or none below the
    root.
    """
    files, passed = manifest_files(source), 0
    batches = _batches(files, root, source, _wanted(source))
    last: str | None = ""
    for batch in _batches(files, root, source, ()):  # in order?
        if (last := _last_in_order(batch.column("key"), last)) is None:
            break
    in_runs, last = [_sorted(batches)] if last is None else [], None
    for names, rows in chain(in_runs, map(_rows, batches)):
        for key, size, etag, modified, *values in rows:
            if key == last:
                raise _refused(source.manifest, f"names {key!r} twice", "keep the row of its newest version alone")
            last, name = key, key.rpartition("/")[2]
            if not name or is_hidden(key) or ("." in name and not name.lower().endswith(_ENDINGS)):
                passed += 1
                continue
            told = source.filter is not None or values.count(None) < len(values)
            meta = _meta(source, dict(zip(names, values, strict=True))) if told else None
            yield Entry(key, size, etag, modified, 0, 1, meta)
    if passed:
        _log.info("%s objects of the manifest are no images by their names, and were passed over", f"{passed:,}")


def manifest_digest(root: Root, source: ManifestSource) -> str:
    """What changes with the objects that a manifest in order names, whatever files and batches it is cut into.

    "" for one that is not in order: each listing of it is compared row by row.
    """
    whole = hashlib.blake2b(source.model_dump_json(exclude={"manifest", "read_ahead"}).encode(), digest_size=16)
    columns: dict[str, list[hashlib.blake2b]] = {}
    last: str | None = ""
    for batch in _batches(manifest_files(source), root, source, _wanted(source)):
        if (last := _last_in_order(batch.column("key"), last)) is None:
            return ""
        for name, raw in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_nested(raw.type):
                raw = pa.array([None if v is None else json.dumps(v, default=str) for v in raw.to_pylist()])
            column = pc.fill_null(pc.cast(raw, pa.large_string()), "\0")
            values, lengths = columns.setdefault(name, [hashlib.blake2b(digest_size=16) for _ in range(2)])
            offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
            values.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
            lengths.update(np.diff(offsets).astype("<i4").tobytes())
    for name in sorted(columns):
        for hasher in columns[name]:
            whole.update(name.encode() + hasher.digest())
    return whole.hexdigest()


def _meta(source: ManifestSource, record: dict[str, Any]) -> str | None:
    """The canonical JSON of an object's caption, label, extra fields and mark; None where it has none of them."""
    failed = source.status is not None and record.get(source.status) in FAILED_STATUSES
    try:
        fields: dict[str, Any] = {
            "caption": parse_caption(record.get(source.caption)) if source.caption else None,
            "label": parse_label(record.get(source.label), source.classes) if source.label else None,
            "extra": pick_extra(record, source.extra, source.caption, (source.label,)),
        }
        if failed or not (source.filter is None or keeps(source.filter, record)):
            fields[FILTERED] = True
        return canonical(fields) if any(value is not None and value != {} for value in fields.values()) else None
    except ValueError as error:
        return canonical({PROBLEM: f"the manifest: {error}"})


# -- Tables: which Parquet files a snapshot of them is -------------------------------------------------------------


def table_snapshot(source: ParquetSource) -> tuple[str, list[ObjectInfo]]:
    """(what tells the snapshot from others, its files below the root, by key); InputError where it cannot be read.

    Files of tables are never written again, so that their names are their versions. A table whose rows are deleted
    one by one, in files beside them, is refused: its files hold rows that are none.
    """
    table, root = source.table, Root(source.uri)
    assert table is not None
    need_package({"delta": "deltalake", "iceberg": "pyiceberg"}[table.format], table.format)
    try:
        told, files, deletes = (_delta if table.format == "delta" else _iceberg)(root, table)
    except PipelineError:
        raise
    except Exception as error:  # noqa: BLE001 - these libraries raise what they like
        raise _no_table(source, f"cannot be read: {' '.join(str(error).split())[:300]}") from None
    if deletes:
        raise _no_table(source, "marks rows as deleted that its files still hold; rewrite (compact) it first")
    below, infos = f"{root.uri.rstrip('/')}/", []
    for path, size in files:
        plain = path.removeprefix("file://") if root.local_path() is not None else path
        if not plain.startswith(below):
            raise _no_table(source, f"holds the file {path}, which does not lie below source.uri")
        name = CONTENT + hashlib.sha256(path.encode()).hexdigest()
        infos.append(ObjectInfo(plain.removeprefix(below), size, name, None))
    return told, sorted(infos, key=lambda info: info.key)


_Snapshot = tuple[str, list[tuple[str, int]], bool]  # what it is called, paths and sizes, whether rows are deleted


def _delta(root: Root, table: TableConfig) -> _Snapshot:
    from deltalake import DeltaTable

    found = DeltaTable(root.uri, version=table.version)
    rows = pa.table(found.get_add_actions(flatten=True)).select(["path", "size_bytes"]).to_pylist()
    deletes = pa.table(found.deletion_vectors()).num_rows > 0
    files = [(f"{root.uri.rstrip('/')}/{unquote(row['path'])}", int(row["size_bytes"])) for row in rows]
    return f"delta {found.version()}", files, deletes


def _iceberg(root: Root, table: TableConfig) -> _Snapshot:
    from pyiceberg.catalog import load_catalog
    from pyiceberg.table import StaticTable

    if table.catalog is not None and table.name is not None:
        found: Any = load_catalog(table.catalog).load_table(table.name)
    else:
        path = table.metadata
        if path is None:
            numbered = [i.key for i in root.list("metadata") if i.key.endswith(".metadata.json")]
            path = root.uri_of(max(numbered, key=lambda key: int(re.sub(r"\D.*", "", Path(key).name.lstrip("v")))))
        found = StaticTable.from_metadata(path)
    snapshot = found.current_snapshot() if table.version is None else found.snapshot_by_id(table.version)
    if snapshot is None:
        raise ValueError(f"it has no snapshot {table.version or ''} (any more)")
    tasks = list(found.scan(snapshot_id=snapshot.snapshot_id).plan_files())
    files = [(task.file.file_path, int(task.file.file_size_in_bytes)) for task in tasks]
    return f"iceberg {snapshot.snapshot_id}", files, any(task.delete_files for task in tasks)


def _no_table(source: ParquetSource, what: str) -> InputError:
    assert source.table is not None
    return InputError(
        f"The {source.table.format} table {source.uri} {what}",
        key="table.version" if source.table.version is not None else "uri",
        value=source.uri if source.table.version is None else source.table.version,
        rule="a snapshot that is still there, of Parquet files below uri, each row of which counts",
        next_step="see to the table, or name another version",
    )


# -- Rows in batches: columns under our names, of objects below the root ------------------------------------------


_Row = tuple[Any, ...]  # key, size, etag, ns of the last change, and the wanted columns in their order


def _wanted(source: ManifestSource) -> tuple[str, ...]:
    """Columns that go into a row's metadata, as they are called; "*" for all."""
    if "*" in source.extra:
        return ("*",)
    asked = [source.caption, source.label, source.status, *source.extra]
    asked += sorted(filter_columns(source.filter)) if source.filter else []
    return tuple(dict.fromkeys(name for name in asked if name))


def _batches(
    files: Sequence[ManifestFile], root: Root, source: ManifestSource, wanted: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """key: string below the root; size: int64; etag: string; modified: int64, ns; what else is wanted, as it is."""
    for file in files:
        with _reading(file.uri), file.root.open(file.info.key) as opened:
            for batch in _opened(file, opened):
                yield _normal(batch, file, root, source, wanted)


def _opened(file: ManifestFile, opened: object) -> Iterator[pa.RecordBatch]:
    if file.info.key.lower().endswith(".parquet"):
        yield from pq.ParquetFile(opened, page_checksum_verification=True).iter_batches(_BATCH_ROWS)
        return
    stream = pa.input_stream(opened, compression="gzip" if file.info.key.lower().endswith(".gz") else None)
    options = pa.csv.ReadOptions(column_names=list(file.columns) or None)
    as_text = pa.csv.ConvertOptions(strings_can_be_null=True, default_column_type=pa.string())  # an etag has zeros
    yield from pa.csv.open_csv(stream, read_options=options, convert_options=as_text)


def _normal(
    batch: pa.RecordBatch, file: ManifestFile, root: Root, source: ManifestSource, wanted: Sequence[str]
) -> pa.RecordBatch:
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in batch.schema.names}
    told = {ours: batch.column(plain[n]) for ours, names in _NAMES.items() for n in reversed(names) if n in plain}
    lacking = [n for n in ("key", "size") if n not in told]
    lacking += [] if "etag" in told or "modified" in told else ["etag (or last_modified)"]
    used = {plain[name] for known in _NAMES.values() for name in known if name in plain}
    names = [n for n in batch.schema.names if n not in used] if tuple(wanted) == ("*",) else wanted
    asked = {getattr(source, name) for name in ("caption", "label") if name in source.model_fields_set} - {None}
    lacking += sorted((asked | set(source.extra) - {"*"}) - set(batch.schema.names))
    if lacking:
        raise _refused(
            file.uri, f"has no column {', '.join(lacking)}; there are {', '.join(batch.schema.names)[:400]}", _COLUMNS
        )
    keep = np.ones(len(batch), bool)
    for name, value in (("latest", "true"), ("deleted", "false")):
        if name in told:
            texts = pc.utf8_lower(pc.cast(told[name], pa.string()))
            keep &= np.asarray(pc.equal(pc.fill_null(texts, value), value))
    key = pc.cast(told["key"], pa.string())
    if file.encoded:
        key = pa.array([None if one is None else unquote(one) for one in key.to_pylist()], pa.string())
    if key.null_count or pc.any(pc.equal(key, "")).as_py():
        raise _refused(file.uri, "has a row without a key", _COLUMNS)
    if "bucket" in told:
        scheme = root.uri.partition("://")[0] if "://" in root.uri else "s3"
        bucket = pc.binary_join_element_wise(f"{scheme}://", pc.cast(told["bucket"], pa.string()), "")
        key = pc.binary_join_element_wise(bucket, key, "/")
    absolute = np.asarray(pc.match_substring_regex(key, r"^([a-z][a-z0-9+.-]*:/)?/"))
    if absolute.any():
        below = f"{root.uri.rstrip('/')}/"
        inside = np.asarray(pc.starts_with(key, below))
        keep &= inside | ~absolute
        key = pc.if_else(pa.array(inside), pc.utf8_slice_codeunits(key, len(below)), key)
    etag, modified = pa.nulls(len(batch), pa.string()), pa.nulls(len(batch), pa.int64())
    if "etag" in told:
        etag = pc.utf8_trim(pc.cast(told["etag"], pa.string()), '"')
    if "modified" in told and pa.types.is_integer(told["modified"].type):
        modified = pc.cast(told["modified"], pa.int64())
    elif "modified" in told:  # a time, or as ISO 8601 has it
        is_time = pa.types.is_timestamp(told["modified"].type)
        kind = told["modified"].type if is_time else pa.timestamp("ns", "UTC")
        modified = pc.cast(pc.cast(pc.cast(told["modified"], kind), pa.timestamp("ns", kind.tz)), pa.int64())
    if root.local_path() is not None:
        # A disk knows no etag, and its times to the nanosecond: what the manifest says tells versions apart.
        etag = pc.coalesce(etag, pc.binary_join_element_wise("modified", pc.cast(modified, pa.string()), " "))
        modified = pa.nulls(len(batch), pa.int64())
    columns = {
        "key": key,
        "size": pc.cast(told["size"], pa.int64()),
        "etag": etag,
        "modified": modified,
        **{f"={n}": batch.column(n) if n in batch.schema.names else pa.nulls(len(batch)) for n in names},
    }
    out = pa.RecordBatch.from_pydict(columns)
    out = out if keep.all() else out.filter(pa.array(keep))
    if out.column("size").null_count:
        raise _refused(file.uri, "has a row without a size", _COLUMNS)
    return out


def _rows(batch: pa.RecordBatch) -> tuple[list[str], Iterable[_Row]]:
    """The names of the wanted columns, and the rows."""
    return [name[1:] for name in batch.schema.names[4:]], zip(*(c.to_pylist() for c in batch.columns), strict=True)


def _last_in_order(key: pa.Array, before: str | None) -> str | None:
    """The last of some keys, that of before where there are none; None when they do not ascend.

    As bytes: which is the order of code points, in which a source lists.
    """
    if not len(key):
        return before
    falls = key[0].as_py() < (before or "") or pc.any(pc.less(key[1:], key[:-1])).as_py()
    return None if falls else str(key[-1].as_py())


def _sorted(batches: Iterator[pa.RecordBatch]) -> tuple[list[str], Iterator[_Row]]:
    """All rows by key: sorted in runs, which lie on disk and are merged. Exhausts the batches."""
    first = next(batches, None)
    names = [] if first is None else [name[1:] for name in first.schema.names[4:]]

    def merged() -> Iterator[_Row]:
        with tempfile.TemporaryDirectory(prefix="latentloom-manifest-") as scratch:
            runs: list[Path] = []
            held: list[pa.RecordBatch] = []

            def spill() -> None:
                runs.append(Path(scratch, f"{len(runs):06d}.arrow"))
                tables = [pa.Table.from_batches([batch]) for batch in held]
                table = pa.concat_tables(tables, promote_options="permissive").sort_by("key")
                with pa.ipc.new_file(str(runs[-1]), table.schema) as file:
                    file.write_table(table, max_chunksize=_BATCH_ROWS)
                held.clear()

            for batch in chain([] if first is None else [first], batches):
                held.append(batch)
                if sum(map(len, held)) >= _RUN_ROWS:
                    spill()
            if held:
                spill()
            yield from heapq.merge(*map(_run, runs), key=itemgetter(0))

    return names, merged()


def _run(path: Path) -> Iterator[_Row]:
    with pa.memory_map(str(path)) as mapped:
        reader = pa.ipc.open_file(mapped)
        for number in range(reader.num_record_batches):
            yield from _rows(reader.get_batch(number))[1]


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except PipelineError:
        raise
    except FileNotFoundError:
        raise _refused(uri, "is not there", "correct the path") from None
    except (pa.ArrowException, ValueError, KeyError, TypeError, *storage_errors()) as error:
        raise _refused(uri, f"cannot be read: {describe(error)}", "mend it, or name another one") from None


def _refused(uri: str, what: str, next_step: str) -> InputError:
    return InputError(
        f"The manifest {uri} {what}",
        key="manifest",
        value=uri,
        rule=f"a row an object: {_COLUMNS}",
        next_step=next_step,
    )
