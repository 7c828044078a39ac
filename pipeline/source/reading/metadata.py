"""metadata.jsonl and metadata.csv beside the images of a folder (the ImageFolder convention of Hugging Face).

A file's `file_name` is relative to the metadata's own directory and may lie deeper; of several the nearest
directory wins. Files in key order visit every directory's subtree in one stretch, so only the metadata of the
directories above the present file are held. Where the source has a filter, a file that it does not keep carries the
mark FILTERED, so that a changed filter changes only the entries it decides otherwise. A line that cannot be
understood, or that names a file which is not there, stops the listing: silently dropping captions or labels would be
worse.
"""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.source.config import FolderSource
from pipeline.source.reading.filters import Cell, filter_columns, keeps
from pipeline.storage.root import Root

# --------------------------------------------------------------------------------------------------------------
# Captions, labels, pass-through fields and EXIF orientations out of whatever a source stores beside its images.


# What the exifread library, and with it img2dataset's `exif` column, prints for tag 0x0112.
_ORIENTATIONS = {
    "horizontal (normal)": 1,
    "mirrored horizontal": 2,
    "rotated 180": 3,
    "mirrored vertical": 4,
    "mirrored horizontal then rotated 90 ccw": 5,
    "rotated 90 cw": 6,
    "mirrored horizontal then rotated 90 cw": 7,
    "rotated 90 ccw": 8,
}
# img2dataset's words for an image that it did not get; any other status is somebody else's, and means nothing here.
FAILED_STATUSES = ("failed_to_download", "failed_to_resize")
MAX_TEXT_BYTES = 1 << 20  # of one row's caption, and of its pass-through fields
_MAX_LABEL = 10**18 - 1
_INTEGER = re.compile(r"\s*[0-9]{1,18}\s*")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else, and for NaN and infinities, which are no JSON.

    A number too large for a double is an infinity, too: written again it would be none of JSON's.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    def finite(digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            raise ValueError(f"{digits[:40]} is too large a number")
        return number

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {type(value).__name__}")
    return value


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Foreign types become their text.

    ValueError for text that is no Unicode (a lone surrogate), over MAX_TEXT_BYTES, or nested without end.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    except (RecursionError, TypeError) as error:  # TypeError: keys of several types cannot be sorted
        raise ValueError(f"the fields are no JSON: {error}") from None
    return _checked(text, "the fields")


def parse_caption(value: Any) -> str | None:
    """Text or nothing; ValueError for any other type, a lone surrogate, or more than MAX_TEXT_BYTES."""
    if value is None or isinstance(value, str):
        return None if value is None else _checked(value, "the caption")
    raise ValueError(f"the caption must be text, not {type(value).__name__}")


def parse_label(value: Any, classes: Sequence[str]) -> int | None:
    """A class number: given as such, as digits, or as one of the class names; ValueError otherwise."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return _known(value, classes)
    if isinstance(value, str):
        if value.strip() in classes:
            return classes.index(value.strip())
        if _INTEGER.fullmatch(value):
            return _known(int(value), classes)
    known = f" or one of the {len(classes)} classes" if classes else ""
    raise ValueError(f"the label {value!r:.60} is no integer from 0 up{known}")


def pick_extra(record: Mapping[str, Any], names: Sequence[str], taken: Sequence[str | None]) -> dict[str, Any]:
    """The pass-through fields: those named, or with "*" all that are not used otherwise."""
    if "*" in names:
        return {k: v for k, v in record.items() if k not in taken}
    return {name: record[name] for name in names if name in record}


def orientation_of(exif: Any) -> int | None:
    """The orientation in img2dataset's exif text (a JSON object as exifread prints it), or None."""
    if isinstance(exif, str | bytes):
        try:
            exif = parse_object(exif)
        except ValueError:
            return None
    if not isinstance(exif, dict):
        return None
    value = exif.get("Image Orientation", exif.get("Orientation"))
    if isinstance(value, str):
        text = value.strip().lower()
        return int(text) if text in set("12345678") else _ORIENTATIONS.get(text)
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 8 else None


def _checked(text: str, what: str) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} cannot be written as UTF-8") from None
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"{what} take {size} bytes, over {MAX_TEXT_BYTES}")
    return text


def _known(label: int, classes: Sequence[str]) -> int:
    if label > _MAX_LABEL:
        raise ValueError(f"the label is beyond {_MAX_LABEL}")
    if classes and label >= len(classes):
        raise ValueError(f"the label {label} is beyond the {len(classes)} classes")
    return label


NAMES = ("metadata.csv", "metadata.jsonl")
FILTERED = "filtered"  # a key of an entry's metadata: the filter does not keep the row


@dataclass
class _Directory:
    path: str  # "" for the root, else ending in "/"
    file: str  # key of the metadata file, "" where there is none
    records: dict[str, tuple[int, str]]  # file name -> (line, canonical JSON)


class FolderMetadata:
    """Finds the record of each file; files must come in key order, then `finish` once."""

    def __init__(self, root: Root, source: FolderSource) -> None:
        self._root, self._source = root, source
        self._open: list[_Directory] = []
        # A file that no metadata name has null in every field.
        self._unnamed = None if source.filter is None or keeps(source.filter, {}) else canonical({FILTERED: True})

    def record_of(self, key: str) -> str | None:
        """The canonical JSON of a file's caption, label, extra fields and mark; None when no metadata name it."""
        while self._open and not key.startswith(self._open[-1].path):
            self._leave()
        innermost = self._open[-1].path if self._open else None
        parts = key.split("/")
        for depth in range(len(parts)):
            path = "".join(part + "/" for part in parts[:depth])
            if innermost is None or len(path) > len(innermost):
                self._open.append(self._read(path))
        # The nearest directory wins.
        for directory in reversed(self._open):
            line_and_record = directory.records.pop(key[len(directory.path) :], None)
            if line_and_record is not None:
                return line_and_record[1]
        return self._unnamed

    def finish(self) -> None:
        """Check the directories that are still open."""
        while self._open:
            self._leave()

    def _leave(self) -> None:
        directory = self._open.pop()
        if directory.records:
            name, (line, _) = next(iter(directory.records.items()))
            more = f" (and {len(directory.records) - 1} more)" if len(directory.records) > 1 else ""
            raise _error(
                self._root.uri_of(directory.file),
                line,
                f"there is no file {directory.path}{name}{more}",
                "remove the line or bring the file back",
            )

    def _read(self, path: str) -> _Directory:
        present = [path + name for name in NAMES if self._root.exists(path + name)]
        if len(present) > 1:
            raise InputError(
                f"{self._root.uri_of(path.rstrip('/'))} holds both {NAMES[0]} and {NAMES[1]}",
                key="uri",
                value=self._source.uri,
                rule="one metadata file per directory",
                next_step="keep one of the two",
            )
        if not present:
            return _Directory(path, "", {})
        return _Directory(path, present[0], self._parse(present[0]))

    def _parse(self, key: str) -> dict[str, tuple[int, str]]:
        where = self._root.uri_of(key)
        size, limit = self._root.info(key).size_bytes, self._source.max_metadata_bytes
        if size > limit:
            raise InputError(
                f"{where} has {size} bytes",
                key="max_metadata_bytes",
                value=limit,
                rule="a metadata file is held in memory while its directory is listed",
                next_step="split it over the directories it speaks of, use Parquet or tar shards, or raise the limit",
            )
        try:
            text = self._root.read_bytes(key).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise _error(where, line, "the text is not UTF-8", "save the file as UTF-8") from None
        csv_file = key.endswith(".csv")
        needed = filter_columns(self._source.filter) if self._source.filter else set()
        records: dict[str, tuple[int, str]] = {}
        for line, parsed in _csv_records(text, needed) if csv_file else _json_records(text):
            try:
                if isinstance(parsed, ValueError):
                    raise parsed
                name = parsed.get("file_name")
                if not isinstance(name, str) or not name:
                    raise ValueError("file_name is missing")
                path = posixpath.normpath(name)
                if path.startswith(("/", "../")) or path in (".", ".."):
                    raise ValueError(f"file_name {name!r} must lie below the metadata's directory")
                meta = self._meta(parsed, text_only=csv_file)
            except ValueError as error:
                raise _error(where, line, str(error), "correct or remove the line") from None
            if path in records:
                raise _error(where, line, f"{path} was already named in line {records[path][0]}", "keep one line")
            records[path] = (line, meta)
        return records

    def _meta(self, record: dict[str, Any], *, text_only: bool) -> str:
        source = self._source
        cells = {name: Cell(value) for name, value in record.items()} if text_only else record
        mark = {} if source.filter is None or keeps(source.filter, cells) else {FILTERED: True}
        taken = ("file_name", source.caption, source.label)
        label = source.label if source.label_from == "metadata" else None
        return canonical(
            {
                "caption": parse_caption(record.get(source.caption)) if source.caption else None,
                "label": parse_label(record.get(label), source.classes) if label else None,
                "extra": pick_extra(record, source.extra, taken),
                **mark,
            }
        )


def _json_records(text: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                yield line, parse_object(content)
            except ValueError as error:
                yield line, error


def _csv_records(text: str, needed: set[str]) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = sorted(needed - set(reader.fieldnames or ()))
        if missing:
            yield 1, ValueError(f"there is no column {missing[0]}, which source.filter names")
        for record in reader:
            if None in record or None in record.values():
                yield (
                    reader.line_num,
                    ValueError(f"{len(reader.fieldnames or ())} cells are needed, as in the header"),
                )
            else:
                yield reader.line_num, dict(record)
    except csv.Error as error:
        yield reader.line_num + 1, ValueError(str(error))  # the counter stands at the last good line


def _error(where: str, line: int, problem: str, next_step: str) -> InputError:
    return InputError(
        f"{where}, line {line}: {problem}",
        key="uri",
        rule="each line names one existing file, with text captions and integer labels",
        next_step=next_step,
    )
