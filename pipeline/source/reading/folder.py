"""Files below a directory as rows, with what stands beside them: metadata files and texts of the same name.

    metadata.jsonl, .csv or .parquet (the ImageFolder convention of Hugging Face); x.jpg + x.txt, x.caption or x.json

A file's `file_name` is relative to the metadata's own directory and may lie deeper. Files in key order visit every
directory's subtree in one stretch, so only the metadata of the directories above the present file are held. Where the
source has a filter, a file that it does not keep carries the mark FILTERED, so that a changed filter changes only the
entries it decides otherwise. A line that cannot be understood, or that names a file which is not there, or one that
another line names, is a row that will be rejected (PROBLEM), as a broken sample of a tar is: no caption and no label
is lost without a word. Texts beside an image are read with it; which they are, and for what, is part of its entry.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
import re
import stat
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.source.config import FolderSource, ManifestSource, ParquetSource, WebDatasetSource
from pipeline.source.reading.filters import keeps
from pipeline.source.reading.parquet import metadata_lines, table_rows
from pipeline.source.reading.parquet_file import TableError
from pipeline.source.reading.rows import (
    FAILED_STATUSES,
    MAX_STORED_BYTES,
    MAX_TEXT_BYTES,
    Entry,
    Failure,
    Ranges,
    SourceRow,
    canonical,
    fetch,
    is_hidden,
    map_ahead,
    parse_object,
)
from pipeline.source.reading.text_file import FILTERED, Metadata, meta_of, picked
from pipeline.source.reasons import Reason
from pipeline.storage.errors import ObjectChanged
from pipeline.storage.root import Lister, ObjectInfo, Root, check_key

_log = logging.getLogger(__name__)
NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TEXTS = "texts"  # another: the files beside an image whose text is its own, each with its version
PROBLEM = "problem"  # another: what is wrong with the line that names the file
_LINES = pa.schema([("key", pa.large_string()), ("number", pa.int64()), ("meta", pa.large_string())])
_CHUNK_LINES = 1 << 16


class _Directory:
    """The metadata file of a directory, "" where there is none, and its lines (_LINES) in the order of their keys.

    A line says of a file: its key, the canonical JSON of the fields, and, here, whether the file has come. Lines are
    held as columns: as objects, they would take several times the memory that the file takes.
    """

    def __init__(self, path: str, file: str, lines: pa.Table) -> None:
        self.path, self.file = path, file
        self._keys, self._numbers, self._metas = (lines[name] for name in _LINES.names)
        self.found = bytearray(len(lines))
        self.next = 0  # the first line whose place in the listing has not come
        foreign = np.flatnonzero(~pc.string_is_ascii(self._keys).to_numpy())
        self._normal = {_normal(self.key(line)): line for line in foreign.tolist()}

    def key(self, line: int) -> str:
        return str(self._keys[line].as_py())

    def number(self, line: int) -> int:
        return int(self._numbers[line].as_py())

    def meta(self, line: int) -> str:
        return str(self._metas[line].as_py())

    def line_of(self, key: str) -> int | None:
        """The line that names a file, by these letters or by others that Unicode holds for the same."""
        line = bisect_left(range(len(self.found)), key, key=self.key)
        if line < len(self.found) and self.key(line) == key:
            return line
        return None if key.isascii() else self._normal.get(_normal(key))


class FolderMetadata:
    """Finds the record of each file; files come in key order, each `enter`ed first, then `finish` once."""

    def __init__(self, root: Root, source: FolderSource) -> None:
        self._root, self._source = root, source
        self._open: list[_Directory] = []
        self.fields: set[str] = set()  # that some line has
        # A file that no metadata name has null in every field.
        self.unnamed = None if source.filter is None or keeps(source.filter, {}) else canonical({FILTERED: True})

    def enter(self, key: str) -> Iterator[tuple[str, str]]:
        """Read what is new on the way to a file; (key, canonical JSON) of lines whose file ought to have come by now.

        Such a line names a file that is not there, or cannot be understood: it is a row, which will be rejected.
        """
        innermost = next((d.path for d in reversed(self._open) if key.startswith(d.path)), None)
        parts = key.split("/")
        for depth in range(len(parts)):
            path = "".join(part + "/" for part in parts[:depth])
            if innermost is None or len(path) > len(innermost):
                self._open.append(self._read(path))
        yield from self._passed(key)
        self._open = [d for d in self._open if key.startswith(d.path)]

    def finish(self) -> Iterator[tuple[str, str]]:
        """The same for the lines that are left."""
        yield from self._passed(None)
        self._open = []

    def record_of(self, key: str) -> str | None:
        """The canonical JSON of a file's caption, label, extra fields and mark; None when no metadata name it."""
        named = [(d, line) for d in self._open if (line := d.line_of(key)) is not None]
        for directory, line in named:
            directory.found[line] = True
        if len(named) > 1:
            places = " and ".join(f"{d.file}, line {d.number(line)}" for d, line in named)
            last, line = named[-1]
            return self._problem(f"{places} both name this file", last.file, last.number(line))
        return named[0][0].meta(named[0][1]) if named else self.unnamed

    def _passed(self, key: str | None) -> Iterator[tuple[str, str]]:
        """Lines before `key` (all, without one) whose file has not come, in order."""
        while True:
            heads = [(d.key(d.next), d) for d in self._open if d.next < len(d.found)]
            first, directory = min(heads, key=itemgetter(0), default=("", None))
            if directory is None or (key is not None and first >= key):
                return
            line, directory.next = directory.next, directory.next + 1
            forms = {unicodedata.normalize(form, first) for form in ("NFC", "NFD")} - {first}
            if not directory.found[line] and not any(self._root.exists(form) for form in forms):  # such comes later
                number, meta = directory.number(line), directory.meta(line)
                problem = f"{directory.file}, line {number} names this file, and it is not there"
                yield first, meta if PROBLEM in parse_object(meta) else self._problem(problem, directory.file, number)

    def _problem(self, problem: str, file: str, line: int) -> str:
        """What stands for a line that is of no use; an InputError where the source is strict."""
        if self._source.strict:
            raise InputError(
                f"{self._root.uri_of(file)}, line {line}: {problem}",
                key="uri",
                rule="each line names one existing file, with text captions and integer labels (source.strict)",
                next_step="correct or remove the line, or set source.strict=false to reject its row alone",
            )
        return canonical({PROBLEM: problem[:500].encode("utf-8", "backslashreplace").decode()})

    def _read(self, path: str) -> _Directory:
        present = [path + name for name in NAMES if self._root.exists(path + name)]
        if len(present) > 1:
            raise InputError(
                f"{self._root.uri_of(path.rstrip('/'))} holds both {' and '.join(p[len(path) :] for p in present)}",
                key="uri",
                value=self._source.uri,
                rule="one metadata file per directory",
                next_step="keep one of them",
            )
        return _Directory(path, present[0] if present else "", self._table(path, present[0] if present else None))

    def _table(self, path: str, file: str | None) -> pa.Table:
        """The lines of a file in order; one that names what an earlier one names stands for itself."""
        if file is None:
            return _LINES.empty_table()
        lines = self._parse(path, file)
        chunks = iter(lambda: list(zip(*islice(lines, _CHUNK_LINES), strict=True)), [])
        tables = (pa.table(list(map(list, columns)), schema=_LINES) for columns in chunks)
        table = _sorted(pa.concat_tables([_LINES.empty_table(), *tables]))
        same = pc.equal(table["key"].slice(1), table["key"].slice(0, max(0, len(table) - 1)))
        again = np.append(False, same.to_numpy())[: len(table)]
        if not again.any():
            return table
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(table))))
        odd = []
        for place in np.flatnonzero(again).tolist():
            number, earlier = (table["number"][i].as_py() for i in (place, int(first[place])))
            name = table["key"][place].as_py()[len(path) :]
            meta = self._problem(f"{name} was already named in line {earlier}", file, number)
            odd.append({"key": _nameless(file, number), "number": number, "meta": meta})
        return _sorted(pa.concat_tables([table.filter(pa.array(~again)), pa.Table.from_pylist(odd, _LINES)]))

    def _parse(self, path: str, file: str) -> Iterator[tuple[str, int, str]]:
        """(key, line, canonical JSON) of each line."""
        size, limit = self._root.info(file).size_bytes, self._source.max_metadata_bytes
        if size > limit:
            raise InputError(
                f"{self._root.uri_of(file)} has {size} bytes",
                key="max_metadata_bytes",
                value=limit,
                rule="a metadata file is held in memory while its directory is listed",
                next_step="split it over the directories it speaks of, use Parquet or tar shards, or raise the limit",
            )
        kind = file.rpartition(".")[2]
        lines = self._parquet_lines(file) if kind == "parquet" else self._text_lines(file, kind)
        for number, name, meta, problem in lines:
            key = _nameless(file, number)
            if problem is not None:
                meta = self._problem(problem, file, number)
            if isinstance(name, str) and name:
                normal = posixpath.normpath(name)
                try:
                    check_key(path + normal)
                except ValueError:
                    problem = (
                        f"file_name {name!r:.200} must lie below the metadata's directory, and have no \\ or NUL"
                    )
                    meta = self._problem(problem, file, number)
                else:
                    key = path + normal
            elif problem is None:
                meta = self._problem("file_name is missing", file, number)
            # Bytes that are no text, which no key may hold, are told by their numbers.
            yield key.encode("utf-8", "xmlcharrefreplace").decode(), number, meta

    def _text_lines(self, file: str, kind: Any) -> Iterator[Metadata]:
        try:
            for lines, names in metadata_lines(self._root, self._root.info(file), kind, self._source):
                self.fields |= set(names)
                yield from lines
        except TableError as error:
            raise InputError(
                f"{self._root.uri_of(file)} cannot be read: {error.message}",
                key="uri",
                rule="a metadata file is CSV or one JSON object a line, of lines that a process of 4 GiB can read",
                next_step="write it again, divide it, or remove it",
            ) from None

    def _parquet_lines(self, file: str) -> Iterator[Metadata]:
        """Rows of a table by the reader of Parquet sources, for which the file names are URIs of images."""
        root = self._root
        table = ParquetSource(
            uri=root.uri, image="file_name", caption=None, label=None, status=None, exif=None, extra=("*",)
        )
        try:
            for number, item in enumerate(table_rows(root, root.info(file), table), 1):
                if isinstance(item, SourceRow):
                    yield number, None, "", item.message or str(item.reason)
                    continue
                row, name = item
                try:
                    record = parse_object(row.extra or "{}")
                    self.fields |= record.keys()
                    yield number, name, meta_of(self._source, record), None
                except ValueError as error:
                    yield number, name, "", str(error)
        except TableError as error:
            raise InputError(
                f"{root.uri_of(file)} cannot be read: {error.message}",
                key="uri",
                rule="metadata.parquet is a table with a column file_name",
                next_step="write it again, or remove it",
            ) from None


def _sorted(lines: pa.Table) -> pa.Table:
    order = pc.sort_indices(lines, [("key", "ascending"), ("number", "ascending")])
    # As most programs write them: a copy would double what they take.
    in_order = (order.to_numpy() == np.arange(len(lines))).all()
    return lines if in_order else lines.take(order)


def _nameless(file: str, number: int) -> str:
    """The key of a line that names nothing, or nothing of its own."""
    return f"{file}?{number:08d}"


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


# -- From a directory to entries, each with what is to be read beside it -------------------------------------------


_TEXTS = (".txt", ".caption", ".json")  # beside an image of the same name
# Files that hold text for people or programs, by their endings: none is an image, and none of them is a row.
_FOR_PROGRAMS = (".jsonl", ".csv", ".tsv", ".html", ".xml", ".yaml", ".yml", ".ini", ".py")
_NO_IMAGES = (*_TEXTS, ".md", ".rst", ".log", *_FOR_PROGRAMS)
_HELD = 10_000  # files of one name held at a time


def list_folder(
    root: Root,
    source: FolderSource,
    excluded: re.Pattern[str] | None,
    directories: Lister | None = None,
) -> Iterator[Entry]:
    """Every file below a root but for hidden and excluded ones and texts, with what stands beside it.

    A text that metadata name as an image is listed all the same: somebody says that it is one.
    """
    metadata = FolderMetadata(root, source)
    local = root.local_path()
    captioned, passed, example = False, 0, ""
    for info, texts in _with_texts(root.list(dangling=True, entries=directories), excluded):
        directory, _, name = info.key.rpartition("/")
        for key, meta in metadata.enter(info.key):
            yield Entry(key, 0, None, None, 0, 1, meta)
        record = metadata.record_of(info.key)
        if name in NAMES or is_hidden(info.key):
            continue
        # A local pipe, socket or device could be read for ever; nothing at all, as behind a broken link, is a reject.
        with contextlib.suppress(OSError):
            if local is not None and not stat.S_ISREG((local / info.key).stat().st_mode):
                continue
        if excluded is not None and excluded.fullmatch(info.key):
            continue
        if record in (None, metadata.unnamed) and not texts and name.lower().endswith(_NO_IMAGES):
            passed, example = passed + 1, example or info.key
            continue
        if texts:
            captioned = True
            # The texts to be read with it, and for what, stand in its metadata: another version, or use, is a change.
            fields = parse_object(record) if record is not None else {}
            if set(fields) == {FILTERED}:
                fields = {}  # nothing was known of it yet: its texts will be filtered
            beside = [[t.key, t.size_bytes, t.etag, t.mtime_ns if t.etag is None else None] for t in texts]
            use = [source.caption, source.label, list(source.extra), list(source.classes), source.filter]
            record = canonical({**fields, TEXTS: beside, "use": use})
        if source.label_from == "directory":
            label = directory.rpartition("/")[2]
            if label not in source.classes:
                raise InputError(
                    f"{info.key} lies in a directory that is no class",
                    key="classes",
                    value=list(source.classes)[:20],
                    rule="with label_from: directory every image's own directory is one of the classes",
                    next_step=f"add {label!r} to classes, or exclude the files",
                )
            fields = parse_object(record) if record is not None else {}
            record = canonical({"caption": None, "extra": {}, **fields, "label": source.classes.index(label)})
        yield Entry(info.key, info.size_bytes, info.etag, info.mtime_ns, 0, 1, record)
    for key, meta in metadata.finish():
        yield Entry(key, 0, None, None, 0, 1, meta)
    if passed:
        _log.info("%s files are texts and no images (for example %s): they were passed over", f"{passed:,}", example)
    if not captioned:
        check_fields(f"No metadata below {root.uri} have", source, metadata.fields)


def _with_texts(
    infos: Iterator[ObjectInfo], excluded: re.Pattern[str] | None
) -> Iterator[tuple[ObjectInfo, list[ObjectInfo]]]:
    """Files with the texts that belong to them: of the same name but for the ending. Such texts are no rows.

    What has a name in common follows each other in a listing, but for what goes on with that name.
    """
    held: list[ObjectInfo] = []
    common = ""
    for info in infos:
        if held and (not info.key.startswith(common) or len(held) >= _HELD):
            yield from _paired(held, excluded)
            held = []
        if not held:
            common = f"{_stem(info.key)}."
        held.append(info)
    yield from _paired(held, excluded)


def _paired(
    infos: Sequence[ObjectInfo], excluded: re.Pattern[str] | None
) -> Iterator[tuple[ObjectInfo, list[ObjectInfo]]]:
    texts: dict[str, list[ObjectInfo]] = {}
    for info in infos:
        if info.key.lower().endswith(_TEXTS) and not (excluded is not None and excluded.fullmatch(info.key)):
            texts.setdefault(_stem(info.key), []).append(info)
    taken = {text.key for texts_of in texts.values() for text in texts_of}
    images = {_stem(info.key) for info in infos if info.key not in taken}
    for info in infos:
        if info.key not in taken:
            yield info, texts.get(_stem(info.key), [])
        elif _stem(info.key) not in images:
            yield info, []


def _stem(key: str) -> str:
    """A key without the ending of its name."""
    directory, slash, name = key.rpartition("/")
    return directory + slash + (name.rpartition(".")[0] or name)


def asked_fields(source: FolderSource | WebDatasetSource) -> Iterator[tuple[str, str]]:
    """(setting, field) of the fields that somebody wrote down."""
    for key in ("caption", "label"):
        name = getattr(source, key)
        if name is not None and key in source.model_fields_set:
            yield key, name
    yield from (("extra", name) for name in source.extra if name != "*")


def check_fields(where: str, source: FolderSource | WebDatasetSource, known: set[str]) -> None:
    """InputError for a field that somebody wrote down and nobody has."""
    for key, name in asked_fields(source):
        if name not in known and not (key == "label" and getattr(source, "label_from", "") == "directory"):
            raise InputError(
                f"{where} a field {name!r}",
                key=key,
                value=name,
                rule=f"the fields that there are: {', '.join(sorted(known - {'file_name'}))[:400] or 'none'}",
                next_step=f"correct the name, or leave source.{key} away",
            )


# -- From entries to rows ---------------------------------------------------------------------------------------


def read_folder(
    root: Root, source: FolderSource | ManifestSource, entries: Sequence[Entry], wanted: Ranges
) -> Iterator[SourceRow]:
    """The wanted rows of a unit of files."""

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
        extra = canonical(fields["extra"], MAX_STORED_BYTES) if fields.get("extra") else None
        return SourceRow(row, entry.key, data, fields.get("caption"), fields.get("label"), extra, source=source.name)

    chosen = ((row, entry) for row, entry in enumerate(entries) if row in wanted)
    rows = map_ahead(read, chosen, 1 if root.local_path() is not None else source.read_ahead)
    yield from (row for row in rows if row is not None)


def _beside(root: Root, source: FolderSource | ManifestSource, fields: dict[str, Any]) -> Failure | None:
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
    assert isinstance(source, FolderSource)  # a manifest has no texts beside its objects
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
