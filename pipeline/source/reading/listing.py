"""Every row of a source as a stream of entries, in one strict order on every store.

    folder:     one entry per file, one row each; captions and labels ride along as canonical JSON
    webdataset: one entry per tar, whose number of rows is not known before it is read
    parquet:    one entry per run of row groups of a file

Entries ascend strictly by (key, row_start). Memory is that of one directory and its metadata.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from pipeline.errors import ConfigError, InputError
from pipeline.source.config import FolderSource, ParquetSource, SourceConfig, WebDatasetSource
from pipeline.source.reading import tar
from pipeline.source.reading.fields import canonical, parse_object
from pipeline.source.reading.metadata import FILTERED, NAMES, TEXTS, FolderMetadata
from pipeline.source.reading.parquet import spans
from pipeline.source.reading.rows import Entry, map_ahead
from pipeline.source.reading.webdataset import known_fields
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import KeyRefused, ObjectInfo, Root

# -- Where the files of a source are: a directory, one file, a glob or a brace pattern, on any store -----------


_MAX_BRACES = 1_000_000
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class SourceLocation:
    """A root, and which keys below it: None for all, else brace-free patterns."""

    root: Root
    patterns: tuple[str, ...] | None


def locate(uri: str, *, patterns_allowed: bool) -> SourceLocation:
    """Split a source URI into root and patterns; InputError when it does not exist or is of the wrong kind."""
    whole = Root(uri)
    special = re.search(r"[*?\[{]", uri) if patterns_allowed else None
    if special is not None and not (whole.local_path() is not None and _kind(whole) != "missing"):
        cut = uri.rfind("/", 0, special.start()) + 1
        return SourceLocation(Root(uri[:cut] or "."), tuple(expand_braces(uri[cut:])))
    kind = _kind(whole)
    if kind == "missing":
        raise InputError(
            f"There is no source at {whole.uri}",
            key="uri",
            value=uri,
            rule="the source must exist before the job starts",
            next_step="check the path, or the bucket and prefix",
        )
    if kind == "directory":
        return SourceLocation(whole, None)
    if not patterns_allowed:
        raise InputError(
            f"The source {whole.uri} is a file",
            key="uri",
            value=uri,
            rule="a folder source is a directory of image files",
            next_step="give its directory, or set kind to webdataset or parquet",
        )
    parent, _, name = whole.uri.rpartition("/")
    # As a pattern that matches itself alone: what is special in it stands in [ ].
    return SourceLocation(Root(parent or "/"), (re.sub(r"([*?\[])", r"[\1]", name),))


def matching(place: SourceLocation, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
    """The objects of a place in key order; without patterns all of some suffixes (.tar, .TAR), none hidden."""
    if place.patterns is None:
        yield from (i for i in place.root.list() if i.key.lower().endswith(suffixes) and not is_hidden(i.key))
        return
    # [*], [?] and [[] are single characters: a pattern with no more than those names one object.
    if any(re.search(r"[*?]|\[(?![*?\[]\])", p) for p in place.patterns):
        accept = compiled(place.patterns, "uri")
        yield from (i for i in place.root.list() if accept.fullmatch(i.key))
        return
    for key in sorted({re.sub(r"\[([*?\[])\]", r"\1", p) for p in place.patterns}):
        try:
            yield place.root.info(key)
        except (FileNotFoundError, ValueError):
            raise InputError(
                f"There is no {place.root.uri}/{key}",
                key="uri",
                rule="every file that a brace pattern names must exist",
                next_step="correct the range, or use a glob (*) to take what is there",
            ) from None


def is_hidden(key: str) -> bool:
    """Whether any part of a key begins with a dot."""
    return key.startswith(".") or "/." in key


def expand_braces(pattern: str) -> list[str]:
    """`a{1..3}.{x,y}` as its six names; ranges keep leading zeros. InputError beyond a million."""
    out = [pattern]
    while any(_BRACE.search(p) for p in out):
        expanded: list[str] = []
        for p in out:
            expanded += _expand_first(p)
            if len(expanded) > _MAX_BRACES:
                raise InputError(
                    f"The pattern {pattern} names more than {_MAX_BRACES} files",
                    key="uri",
                    next_step="use a glob (*) or the directory",
                )
        out = expanded
    return out


def _expand_first(pattern: str) -> list[str]:
    brace = _BRACE.search(pattern)
    if brace is None:
        return [pattern]
    numbers = _RANGE.fullmatch(brace[1])
    if numbers is None:
        words = brace[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        step = 1 if last >= first else -1
        count = min(abs(last - first), _MAX_BRACES) + 1  # one too many is enough to be refused
        words = [str(first + step * n).zfill(width) for n in range(count)]
    return [pattern[: brace.start()] + word + pattern[brace.end() :] for word in words]


def compiled(patterns: Sequence[str], key: str) -> re.Pattern[str]:
    """What any of some globs accepts; InputError names the one that is none."""
    for pattern in patterns:
        try:
            re.compile(glob_regex(pattern))
        except re.error as error:
            raise InputError(
                f"{pattern} is no pattern: {error}",
                key=key,
                value=pattern,
                rule="in [ ] a range goes upwards, as in [a-z]",
                next_step="correct the pattern",
            ) from None
    return re.compile("|".join(f"(?:{glob_regex(p)})" for p in patterns))


def glob_regex(pattern: str) -> str:
    """A glob as a regular expression: * and ? stay within one directory, ** crosses them."""
    out, at = "", 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**/", at):
            out, at = out + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif char in "*?":
            out, at = out + ("[^/]*" if char == "*" else "[^/]"), at + 1
        elif char == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out, at = out + "[" + ("^" + inside[1:] if inside[0] in "!^" else inside) + "]", end + 1
        else:
            out, at = out + re.escape(char), at + 1
    return out


def _kind(root: Root) -> str:
    try:
        return root.kind()
    except storage_errors() as error:
        raise InputError(
            f"The source {root.uri} cannot be read: {describe(error)}",
            key="uri",
            value=root.uri,
            rule="the source must be readable by this process",
            next_step="check the URI, the endpoint and the credentials",
        ) from None


_PARQUET_SUFFIXES = (".parquet", ".pq")
_FOOTERS = 4  # files opened at a time while listing; each may have a process of its own to parse it
Span = tuple[int, int | None, int]  # first row, row after the last, stored bytes


class KnownEntry(Protocol):
    """What an earlier listing has to remember of an entry."""

    @property
    def key(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def etag(self) -> str | None: ...
    @property
    def row_start(self) -> int: ...
    @property
    def row_stop(self) -> int | None: ...


def source_root(source: SourceConfig) -> Root:
    """The root that the keys of a source's entries are relative to; InputError when there is no source."""
    return _place(source).root


def list_entries(source: SourceConfig, known: Iterable[KnownEntry] = ()) -> Iterator[Entry]:
    """All entries, streaming, strictly ordered; InputError for a missing, empty or unusable source.

    `known`: entries of an earlier listing, in the same order, which save opening files that their etag shows to be
    the same. Files that no etag describes are opened each time.
    """
    place = _place(source)
    if isinstance(source, FolderSource):
        entries = _folder(place.root, source)
    elif isinstance(source, WebDatasetSource):
        tars = matching(place, tar.SUFFIXES)
        entries = _tars(place, source, (Entry(i.key, i.size_bytes, i.etag, i.mtime_ns, 0, None, None) for i in tars))
    else:
        entries = _parquets(place, source, known)
    last: tuple[str, int] | None = None
    try:
        for entry in entries:
            _check_order(last, entry, place.root)
            last = (entry.key, entry.row_start)
            yield entry
    except storage_errors() as error:
        raise InputError(
            f"The source {place.root.uri} cannot be listed: {describe(error)}",
            key="uri",
            value=source.uri,
            next_step="check the store and the credentials, then run the same command again",
        ) from None
    except KeyRefused as error:
        raise InputError(
            f"The source {place.root.uri} holds a file that cannot be read by its name: {error}",
            key="uri",
            value=source.uri,
            rule="names have no backslash, no NUL and no empty part",
            next_step="rename the file, or leave it out by a pattern",
        ) from None
    if last is None:
        raise InputError(
            f"The source {place.root.uri} is empty",
            key="uri",
            value=source.uri,
            rule=f"a {source.kind} source holds at least one {'file' if source.kind == 'folder' else 'shard'}",
            next_step="check the path and the pattern; hidden files (.name) are not counted",
        )


def check_apart(source: SourceConfig, output: Root) -> None:
    """ConfigError when a listing of the source would hold what a job writes to `output`: it would never end."""
    if isinstance(source, WebDatasetSource):
        return  # nothing that is written ends in .tar
    place = _place(source)
    # Local places by their real paths: a link may lead from one into the other.
    outer, inner = (os.path.realpath(r.uri) if r.local_path() is not None else r.uri for r in (place.root, output))
    below = outer.rstrip("/") + "/"
    if inner != outer and not inner.startswith(below):
        return
    inside = inner[len(below) :] if inner != outer else ""  # the output's key below the source
    written = f"{inside}/data/0{_PARQUET_SUFFIXES[0]}".lstrip("/")
    if isinstance(source, FolderSource):
        taken = not (source.exclude and compiled(source.exclude, "exclude").fullmatch(written))
    else:
        taken = place.patterns is None or bool(compiled(place.patterns, "uri").fullmatch(written))
    if taken and not is_hidden(written):
        raise ConfigError(
            "The output lies inside the source: every run would find files of the run before it",
            key="output.uri",
            value=output.uri,
            rule=f"what is written is no part of the source {place.root.uri}",
            next_step="name an output elsewhere"
            + (f", or leave it out by exclude=['{inside}/**']" if source.kind == "folder" and inside else ""),
        )


def _place(source: SourceConfig) -> SourceLocation:
    return locate(source.uri, patterns_allowed=not isinstance(source, FolderSource))


_TEXTS = (".txt", ".caption", ".json")  # beside an image of the same name
_HELD = 10_000  # files of one name held at a time


def _folder(root: Root, source: FolderSource) -> Iterator[Entry]:
    metadata = FolderMetadata(root, source)
    excluded = compiled(source.exclude, "exclude") if source.exclude else None
    local = root.local_path()
    captioned = False
    for info, texts in _with_texts(root.list(dangling=True), excluded):
        directory, _, name = info.key.rpartition("/")
        for key, meta in metadata.enter(info.key):
            yield Entry(key, 0, None, None, 0, 1, meta)
        record = metadata.record_of(info.key)
        if name in NAMES or is_hidden(info.key):
            continue
        # A local pipe, socket or device could be read for ever.
        if local is not None and _is_special(local / info.key):
            continue
        if excluded is not None and excluded.fullmatch(info.key):
            continue
        if texts:
            captioned = True
            record = _told_of(texts, source, record)
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
    if not captioned:
        _check_fields(f"No metadata below {root.uri} have", source, metadata.fields)


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
    taken = [text for texts_of in texts.values() for text in texts_of]
    images = {_stem(info.key) for info in infos if info not in taken}
    for info in infos:
        if info not in taken:
            yield info, texts.get(_stem(info.key), [])
        elif _stem(info.key) not in images:
            yield info, []


def _stem(key: str) -> str:
    """A key without the ending of its name."""
    directory, slash, name = key.rpartition("/")
    return directory + slash + (name.rpartition(".")[0] or name)


def _told_of(texts: list[ObjectInfo], source: FolderSource, record: str | None) -> str:
    """A file's metadata with the texts to be read with it, and for what: another version, or use, is a change."""
    fields = parse_object(record) if record is not None else {}
    if set(fields) == {FILTERED}:
        fields = {}  # nothing was known of it yet: its texts will be filtered
    beside = [[t.key, t.size_bytes, t.etag, t.mtime_ns if t.etag is None else None] for t in texts]
    use = [source.caption, source.label, list(source.extra), list(source.classes), source.filter]
    return canonical({**fields, TEXTS: beside, "use": use})


def _is_special(path: Path) -> bool:
    """Whether there is something that is no regular file; nothing at all, as behind a broken link, is not special."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _tars(place: SourceLocation, source: WebDatasetSource, entries: Iterator[Entry]) -> Iterator[Entry]:
    """The tars; of the first, whether its first samples have the fields that somebody wrote down."""
    for number, entry in enumerate(entries):
        if number == 0 and any(True for _ in _asked(source)):
            known, samples = known_fields(place.root, source, entry)
            if known is not None:
                where = f"None of the first {samples} samples of {place.root.uri_of(entry.key)} has"
                _check_fields(where, source, known)
        yield entry


def _asked(source: FolderSource | WebDatasetSource) -> Iterator[tuple[str, str]]:
    """(setting, field) of the fields that somebody wrote down."""
    for key in ("caption", "label"):
        name = getattr(source, key)
        if name is not None and key in source.model_fields_set:
            yield key, name
    yield from (("extra", name) for name in source.extra if name != "*")


def _check_fields(where: str, source: FolderSource | WebDatasetSource, known: set[str]) -> None:
    """InputError for a field that somebody wrote down and nobody has."""
    for key, name in _asked(source):
        if name not in known and not (key == "label" and getattr(source, "label_from", "") == "directory"):
            raise InputError(
                f"{where} a field {name!r}",
                key=key,
                value=name,
                rule=f"the fields that there are: {', '.join(sorted(known - {'file_name'}))[:400] or 'none'}",
                next_step=f"correct the name, or leave source.{key} away",
            )


def _parquets(place: SourceLocation, source: ParquetSource, known: Iterable[KnownEntry]) -> Iterator[Entry]:
    earlier = _Earlier(known)
    first = True

    def spans_of(file: tuple[ObjectInfo, list[Span] | None]) -> tuple[ObjectInfo, list[Span]]:
        info, planned = file
        return info, list(spans(place.root, info, source)) if planned is None else planned

    def files() -> Iterator[tuple[ObjectInfo, list[Span] | None]]:
        nonlocal first
        for info in matching(place, _PARQUET_SUFFIXES):
            planned = earlier.spans(info)
            # The first is opened always: a column that is configured and not there is an error, whatever is known.
            yield info, None if first else planned
            first = False

    for info, runs in map_ahead(spans_of, files(), min(source.read_ahead, _FOOTERS)):
        for start, stop, size in runs:
            yield Entry(info.key, size, info.etag, info.mtime_ns, start, stop, None)


class _Earlier:
    """The spans of files in an earlier listing, asked for in its order; holds those of one file."""

    def __init__(self, entries: Iterable[KnownEntry]) -> None:
        self._files = groupby(entries, key=lambda entry: entry.key)
        self._key, self._entries = "", list[KnownEntry]()
        self._ended = False

    def spans(self, info: ObjectInfo) -> list[Span] | None:
        """What is known of the file, if that is all of it, and of the same version."""
        while not self._ended and self._key < info.key:
            key, entries = next(self._files, (None, iter(())))
            self._ended = key is None
            self._key, self._entries = key or "", list(entries)
        if self._key != info.key or info.etag is None:
            return None
        same = [(e.row_start, e.row_stop, e.size_bytes) for e in self._entries if e.etag == info.etag]
        stops = [0, *(stop for _, stop, _ in same)]
        whole = bool(same) and all(start == end for (start, _, _), end in zip(same, stops, strict=False))
        # Without a last row a file was damaged, or could not be read in time: it is looked at again.
        return same if whole and None not in stops else None


def _check_order(last: tuple[str, int] | None, entry: Entry, root: Root) -> None:
    try:
        entry.key.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The name of {entry.key!r} in {root.uri} is not UTF-8",
            key="uri",
            rule="keys are text",
            next_step="rename the file",
        ) from None
    if last is not None and (entry.key, entry.row_start) <= last:
        raise InputError(
            f"The listing of {root.uri} is out of order: {entry.key!r} after {last[0]!r}",
            key="uri",
            rule="a source does not change while it is listed",
            next_step="run the same command again when nothing writes there",
        )
