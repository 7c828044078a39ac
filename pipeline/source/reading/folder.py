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
import csv
import io
import logging
import posixpath
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pipeline.errors import InputError
from pipeline.source.config import FolderSource, ManifestSource, ParquetSource, WebDatasetSource
from pipeline.source.reading.filters import Cell, filter_columns, keeps
from pipeline.source.reading.parquet import table_rows
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
    parse_caption,
    parse_label,
    parse_object,
    pick_extra,
)
from pipeline.source.reasons import Reason
from pipeline.storage.errors import ObjectChanged
from pipeline.storage.root import ObjectInfo, Root, check_key

_log = logging.getLogger(__name__)
NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
csv.field_size_limit(MAX_TEXT_BYTES)  # of a cell, as of any text; the library's own limit is an eighth of it
_MAX_LINE_BYTES = 16 << 20  # what may be made of a longer one, some twenty times its size, is not tried
FILTERED = "filtered"  # a key of an entry's metadata: the filter does not keep the row
TEXTS = "texts"  # another: the files beside an image whose text is its own, each with its version
PROBLEM = "problem"  # another: what is wrong with the line that names the file


@dataclass(slots=True)
class _Line:
    """What a line says of a file: its key, the canonical JSON of the fields, and whether the file has come."""

    key: str
    number: int
    meta: str
    found: bool = False


class _Directory:
    """The metadata file of a directory, "" where there is none, and its lines in the order of their keys."""

    def __init__(self, path: str, file: str, lines: Iterable[_Line]) -> None:
        self.path, self.file = path, file
        self.lines = sorted(lines, key=lambda line: line.key)
        self.next = 0  # the first line whose place in the listing has not come
        self._exact = {line.key: line for line in self.lines}
        self._normal = {_normal(line.key): line for line in self.lines if not line.key.isascii()}

    def line_of(self, key: str) -> _Line | None:
        """The line that names a file, by these letters or by others that Unicode holds for the same."""
        return self._exact.get(key) or (None if key.isascii() else self._normal.get(_normal(key)))


class FolderMetadata:
    """Finds the record of each file; files come in key order, each `enter`ed first, then `finish` once."""

    def __init__(self, root: Root, source: FolderSource) -> None:
        self._root, self._source = root, source
        self._open: list[_Directory] = []
        self.fields: set[str] = set()  # that some line has
        self._needed = filter_columns(source.filter) if source.filter else set()
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
        for _, line in named:
            line.found = True
        if len(named) > 1:
            places = " and ".join(f"{d.file}, line {line.number}" for d, line in named)
            return self._problem(f"{places} both name this file", named[-1][0].file, named[-1][1].number)
        return named[0][1].meta if named else self.unnamed

    def _passed(self, key: str | None) -> Iterator[tuple[str, str]]:
        """Lines before `key` (all, without one) whose file has not come, in order."""
        while True:
            heads = [(d.lines[d.next].key, d) for d in self._open if d.next < len(d.lines)]
            first, directory = min(heads, key=itemgetter(0), default=("", None))
            if directory is None or (key is not None and first >= key):
                return
            line = directory.lines[directory.next]
            directory.next += 1
            forms = {unicodedata.normalize(form, line.key) for form in ("NFC", "NFD")} - {line.key}
            if not line.found and not any(self._root.exists(form) for form in forms):  # such a one comes later
                problem = f"{directory.file}, line {line.number} names this file, and it is not there"
                bad = PROBLEM in parse_object(line.meta)
                yield line.key, line.meta if bad else self._problem(problem, directory.file, line.number)

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
        return _Directory(path, present[0], self._parse(path, present[0])) if present else _Directory(path, "", ())

    def _parse(self, path: str, file: str) -> Iterator[_Line]:
        size, limit = self._root.info(file).size_bytes, self._source.max_metadata_bytes
        if size > limit:
            raise InputError(
                f"{self._root.uri_of(file)} has {size} bytes",
                key="max_metadata_bytes",
                value=limit,
                rule="a metadata file is held in memory while its directory is listed",
                next_step="split it over the directories it speaks of, use Parquet or tar shards, or raise the limit",
            )
        lines_of = {"csv": self._csv_lines, "jsonl": self._json_lines, "parquet": self._parquet_lines}
        named: dict[str, int] = {}
        for number, name, meta in lines_of[file.rpartition(".")[2]](file):
            key = f"{file}?{number:08d}"  # of a line that names nothing
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
                    if normal in named:
                        meta = self._problem(f"{normal} was already named in line {named[normal]}", file, number)
                    else:
                        key, named[normal] = path + normal, number
            elif PROBLEM not in parse_object(meta):
                meta = self._problem("file_name is missing", file, number)
            # Bytes that are no text, which no key may hold, are told by their numbers.
            yield _Line(key.encode("utf-8", "xmlcharrefreplace").decode(), number, meta)

    def _json_lines(self, file: str) -> Iterator[tuple[int, Any, str]]:
        """(line, file name, canonical JSON) of each; where a line is broken, of what can be read of it."""
        for number, line in enumerate(io.BytesIO(self._root.read_bytes(file)), 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            record: dict[str, Any] = {}
            try:
                if len(line) > _MAX_LINE_BYTES:
                    raise ValueError(f"the line has {len(line):,} bytes, at most {_MAX_LINE_BYTES:,}")
                record = parse_object(line.decode("utf-8", "surrogateescape"))
                line.decode()
                yield number, record.get("file_name"), self._meta(record)
            except ValueError as error:
                wrong = "the text is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                yield number, record.get("file_name"), self._problem(wrong, file, number)

    def _csv_lines(self, file: str) -> Iterator[tuple[int, Any, str]]:
        text = self._root.read_bytes(file).decode("utf-8-sig", "surrogateescape")
        # Divided by what gives the first line a cell file_name; by commas where nothing does.
        first = next(iter(text[: MAX_TEXT_BYTES // 2].splitlines()), "")
        named = (d for d in ",;\t|" if "file_name" in next(csv.reader([first], delimiter=d), []))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=next(named, ","), strict=True)
        try:
            names = next(reader, [])
            wrong = [f"there is no column {name}, which source.filter names" for name in self._needed - set(names)]
            wrong += [f"there are two columns {name!r}" for name in names if names.count(name) > 1]
            if "file_name" not in names:
                wrong.append(f"there is no column file_name; there are {', '.join(names)[:300]}")
        except csv.Error as error:
            wrong = [str(error)]
        if wrong:
            raise InputError(
                f"{self._root.uri_of(file)}, line 1: {wrong[0]}",
                key="uri",
                rule="the first line names the columns, each once, file_name among them",
                next_step="correct the first line",
            )
        while True:
            try:
                row = next(reader, None)
                if row is None:
                    return
                record = dict(zip(names, row, strict=False))
                if not row:
                    continue
                if len(row) != len(names):
                    raise ValueError(f"{len(names)} cells are needed, as in the header, and there are {len(row)}")
                "\n".join(row).encode()
                meta = self._meta({name: Cell(value) for name, value in record.items()})
            except (ValueError, csv.Error) as error:
                wrong_line = "the text is not UTF-8" if isinstance(error, UnicodeError) else str(error)
                lost = isinstance(error, csv.Error)  # where such a line ends, and the next begins, is not known
                meta = self._problem(wrong_line, file, reader.line_num)
                record = {} if lost else record
            yield reader.line_num, record.get("file_name"), meta

    def _parquet_lines(self, file: str) -> Iterator[tuple[int, Any, str]]:
        """Rows of a table by the reader of Parquet sources, for which the file names are URIs of images."""
        root = self._root
        table = ParquetSource(
            uri=root.uri, image="file_name", caption=None, label=None, status=None, exif=None, extra=("*",)
        )
        try:
            for number, item in enumerate(table_rows(root, root.info(file), table), 1):
                if isinstance(item, SourceRow):
                    yield number, None, self._problem(item.message or str(item.reason), file, number)
                    continue
                row, name = item
                try:
                    yield number, name, self._meta(parse_object(row.extra or "{}"))
                except ValueError as error:
                    yield number, name, self._problem(str(error), file, number)
        except TableError as error:
            raise InputError(
                f"{root.uri_of(file)} cannot be read: {error.message}",
                key="uri",
                rule="metadata.parquet is a table with a column file_name",
                next_step="write it again, or remove it",
            ) from None

    def _meta(self, record: dict[str, Any]) -> str:
        self.fields |= record.keys()
        mark = {} if self._source.filter is None or keeps(self._source.filter, record) else {FILTERED: True}
        return canonical({**picked(self._source, record), **mark})


def picked(source: FolderSource, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder keeps of a record: caption, label and extra fields; ValueError where one is of the wrong type."""
    label = source.label if source.label_from == "metadata" else None
    return {
        "caption": parse_caption(record.get(source.caption)) if source.caption else None,
        "label": parse_label(record.get(label), source.classes) if label else None,
        "extra": pick_extra(record, source.extra, source.caption, ("file_name", source.label)),
    }


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


# -- From a directory to entries, each with what is to be read beside it -------------------------------------------


_TEXTS = (".txt", ".caption", ".json")  # beside an image of the same name
# Files that hold text for people or programs, by their endings: none is an image, and none of them is a row.
_FOR_PROGRAMS = (".jsonl", ".csv", ".tsv", ".html", ".xml", ".yaml", ".yml", ".ini", ".py")
_NO_IMAGES = (*_TEXTS, ".md", ".rst", ".log", *_FOR_PROGRAMS)
_HELD = 10_000  # files of one name held at a time


def list_folder(root: Root, source: FolderSource, excluded: re.Pattern[str] | None) -> Iterator[Entry]:
    """Every file below a root but for hidden and excluded ones and texts, with what stands beside it.

    A text that metadata name as an image is listed all the same: somebody says that it is one.
    """
    metadata = FolderMetadata(root, source)
    local = root.local_path()
    captioned, passed, example = False, 0, ""
    for info, texts in _with_texts(root.list(dangling=True), excluded):
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
