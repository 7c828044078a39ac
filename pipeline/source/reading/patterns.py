"""Where the files of a source are: a directory, one file, a glob or a brace pattern, on any store."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import ObjectInfo, Root

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
            key="source.uri",
            value=uri,
            rule="the source must exist before the job starts",
            next_step="check the path, or the bucket and prefix",
        )
    if kind == "directory":
        return SourceLocation(whole, None)
    if not patterns_allowed:
        raise InputError(
            f"The source {whole.uri} is a file",
            key="source.uri",
            value=uri,
            rule="a folder source is a directory of image files",
            next_step="give its directory, or set source.kind to webdataset or parquet",
        )
    parent, _, name = whole.uri.rpartition("/")
    return SourceLocation(Root(parent or "/"), (_escape(name),))


def matching(place: SourceLocation, suffixes: tuple[str, ...]) -> Iterator[ObjectInfo]:
    """The objects of a place in key order; without patterns all of some suffixes (.tar, .TAR), none hidden."""
    if place.patterns is None:
        yield from (i for i in place.root.list() if i.key.lower().endswith(suffixes) and not is_hidden(i.key))
        return
    if any(_is_glob(p) for p in place.patterns):
        accept = compiled(place.patterns, "source.uri")
        yield from (i for i in place.root.list() if accept.fullmatch(i.key))
        return
    for key in sorted({_unescape(p) for p in place.patterns}):
        try:
            yield place.root.info(key)
        except (FileNotFoundError, ValueError):
            raise InputError(
                f"There is no {place.root.uri}/{key}",
                key="source.uri",
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
                    key="source.uri",
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


def _is_glob(pattern: str) -> bool:
    return re.search(r"[*?]|\[(?![*?\[]\])", pattern) is not None


def _escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _unescape(pattern: str) -> str:
    return re.sub(r"\[([*?\[])\]", r"\1", pattern)


def _kind(root: Root) -> str:
    try:
        return root.kind()
    except storage_errors() as error:
        raise InputError(
            f"The source {root.uri} cannot be read: {describe(error)}",
            key="source.uri",
            value=root.uri,
            rule="the source must be readable by this process",
            next_step="check the URI, the endpoint and the credentials",
        ) from None
