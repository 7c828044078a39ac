"""Every row of a source as a stream of entries, in one strict order on every store.

    folder:     one entry per file, one row each; captions and labels ride along as canonical JSON
    manifest:   the same for each object that it names
    webdataset: one entry per tar, whose number of rows is not known before it is read
    parquet:    one entry per run of row groups of a file

Entries ascend strictly by (key, row_start). Memory is that of one directory and its metadata. `read_unit` gives the
rows of entries, whatever kind of source they come from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Protocol

from pipeline.config import installed_plugin
from pipeline.errors import ConfigError, InputError
from pipeline.source.config import (
    FolderSource,
    InstalledSource,
    ManifestSource,
    ParquetSource,
    SourceConfig,
    WebDatasetSource,
)
from pipeline.source.reading import tar
from pipeline.source.reading.folder import asked_fields, check_fields, list_folder, read_folder
from pipeline.source.reading.manifest import list_manifest, manifest_digest, table_snapshot
from pipeline.source.reading.parquet import read_parquets, spans
from pipeline.source.reading.rows import EndOfUnit, Entry, Ranges, SourceRow, is_hidden, map_ahead
from pipeline.source.reading.webdataset import known_fields, read_tars
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import CONTENT, KeyRefused, Lister, ObjectInfo, Root

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


def matching(
    place: SourceLocation, suffixes: tuple[str, ...], directories: Lister | None = None
) -> Iterator[ObjectInfo]:
    """The objects of a place in key order; without patterns all of some suffixes (.tar, .TAR), none hidden."""
    listed = place.root.list(entries=directories)
    if place.patterns is None:
        yield from (i for i in listed if i.key.lower().endswith(suffixes) and not is_hidden(i.key))
        return
    # [*], [?] and [[] are single characters: a pattern with no more than those names one object.
    if any(re.search(r"[*?]|\[(?![*?\[]\])", p) for p in place.patterns):
        accept = compiled(place.patterns, "uri")
        yield from (i for i in listed if accept.fullmatch(i.key))
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
SOURCES = "latentloom.sources"
_HELD = {
    "installed": "entry",
    "folder": "file",
    "manifest": "object below uri",
    "webdataset": "shard",
    "parquet": "shard",
}
_HASHING = 4  # files hashed at a time
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


def list_entries(
    source: SourceConfig, known: Iterable[KnownEntry] = (), directories: Lister | None = None
) -> Iterator[Entry]:
    """All entries, streaming, strictly ordered; InputError for a missing, empty or unusable source.

    `known`: entries of an earlier listing, in the same order, which save opening files that their etag shows to be
    the same. Files that no etag describes are opened each time. directories: what lists those of the source's root,
    instead of itself.
    """
    place = _place(source)
    entries: Iterator[Entry]
    if isinstance(source, InstalledSource):
        entries = iter(_installed(source).list_entries(known))
    elif isinstance(source, FolderSource):
        excluded = compiled(source.exclude, "exclude") if source.exclude else None
        entries = list_folder(place.root, source, excluded, directories)
    elif isinstance(source, ManifestSource):
        entries = list_manifest(place.root, source)
    elif isinstance(source, WebDatasetSource):
        tars = matching(place, tar.SUFFIXES, directories)
        entries = _tars(place, source, (Entry(i.key, i.size_bytes, i.etag, i.mtime_ns, 0, None, None) for i in tars))
    else:
        entries = _parquets(place, source, known, directories)
    if source.detect == "content":
        entries = _hashed(place.root, entries)
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
            rule=f"a source of kind {source.kind} holds at least one {_HELD.get(source.kind, 'shard')}",
            next_step="check the path and the pattern; hidden files (.name) and texts are not counted",
        )


def listing_digest(source: SourceConfig) -> str:
    """What changes with what a source lists, where that can be told without comparing every row; else ""."""
    if isinstance(source, ParquetSource) and source.table is not None:
        return table_snapshot(source)[0]
    return manifest_digest(source_root(source), source) if isinstance(source, ManifestSource) else ""


def _hashed(root: Root, entries: Iterator[Entry]) -> Iterator[Entry]:
    """Entries without an etag with the hash of their object as one; what cannot be read keeps none."""

    def hashed(file: list[Entry]) -> list[Entry]:
        if file[0].etag is not None:  # the store has compared its content already
            return file
        try:
            with root.open(file[0].key) as opened:
                etag = CONTENT + hashlib.file_digest(opened, "sha256").hexdigest()
        except storage_errors():
            return file  # whoever reads its rows says why
        return [replace(entry, etag=etag) for entry in file]

    files = (list(parts) for _, parts in groupby(entries, key=lambda entry: entry.key))
    for file in map_ahead(hashed, files, _HASHING):
        yield from file


def check_apart(source: SourceConfig, output: Root) -> None:
    """ConfigError when a listing of the source would hold what a job writes to `output`: it would never end."""
    if isinstance(source, WebDatasetSource | ManifestSource | InstalledSource):
        return  # nothing that is written ends in .tar, or is named by somebody's manifest or plug-in
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
    if isinstance(source, InstalledSource):
        return SourceLocation(Root(source.uri), None)  # whether anything is there, the plug-in knows
    return locate(source.uri, patterns_allowed=not isinstance(source, FolderSource | ManifestSource))


def _tars(place: SourceLocation, source: WebDatasetSource, entries: Iterator[Entry]) -> Iterator[Entry]:
    """The tars; of the first, whether its first samples have the fields that somebody wrote down."""
    for number, entry in enumerate(entries):
        asked = {name for _, name in asked_fields(source)} if number == 0 else set()
        if asked:
            known, samples = known_fields(place.root, source, entry, asked)
            if known is not None:
                where = f"None of the first {samples} samples of {place.root.uri_of(entry.key)} has"
                check_fields(where, source, known)
        yield entry


def _parquets(
    place: SourceLocation, source: ParquetSource, known: Iterable[KnownEntry], directories: Lister | None
) -> Iterator[Entry]:
    earlier = _Earlier(known)
    first = True

    def spans_of(file: tuple[ObjectInfo, list[Span] | None]) -> tuple[ObjectInfo, list[Span]]:
        info, planned = file
        return info, list(spans(place.root, info, source)) if planned is None else planned

    def files() -> Iterator[tuple[ObjectInfo, list[Span] | None]]:
        nonlocal first
        listed = table_snapshot(source)[1] if source.table is not None else None
        for info in matching(place, _PARQUET_SUFFIXES, directories) if listed is None else listed:
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


# -- The rows of a unit, whatever kind of source it comes from -------------------------------------------------


_log = logging.getLogger(__name__)


class ReadableSource(Protocol):
    """What a plug-in of the group latentloom.sources makes of its configuration, see `InstalledSource`.

    Driver and workers make one each: nothing is handed from one to the other but entries.
    """

    def list_entries(self, known: Iterable[KnownEntry]) -> Iterable[Entry]:
        """Everything there is, ascending by (key, row_start); known: what an earlier listing gave, in that order."""
        ...

    def read_unit(
        self, entries: Sequence[Entry], ranges: Sequence[tuple[int, int | None]]
    ) -> Iterable[SourceRow | EndOfUnit]:
        """The rows of the concatenated entries inside half-open ranges, in order: bytes, or a reason without any.

        Where an entry's row_stop is None the end is told at last, by an `EndOfUnit`.
        """
        ...


_made: dict[str, ReadableSource] = {}  # once per process, not once per unit


def _installed(source: InstalledSource) -> ReadableSource:
    key = source.model_dump_json()
    if key not in _made:
        _made[key] = installed_plugin(SOURCES, source.plugin, key="plugin").load()(source)
    return _made[key]


_root = lru_cache(maxsize=16)(source_root)  # asks the store once per process, not once per unit


def read_unit(
    source: SourceConfig, entries: Sequence[Entry], ranges: Sequence[tuple[int, int | None]]
) -> Iterator[SourceRow | EndOfUnit]:
    """Rows of the concatenated entries inside the half-open ranges (a stop of None is the unit's end), in order."""
    if isinstance(source, InstalledSource):
        yield from _installed(source).read_unit(entries, ranges)
        return
    wanted, root = Ranges(ranges), _root(source)
    if isinstance(source, FolderSource | ManifestSource):
        yield from read_folder(root, source, entries, wanted)
    elif isinstance(source, WebDatasetSource):
        yield from read_tars(root, source, entries, wanted)
    else:
        assert isinstance(source, ParquetSource)

        yield from read_parquets(root, source, entries, wanted)
