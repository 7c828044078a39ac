"""Samples out of tar shards: neighbouring members of one basename form a sample.

    dir/0001.jpg + dir/0001.txt + dir/0001.json + dir/0001.cls  ->  key "shard.tar/dir/0001"

The basename ends at the first dot of the last path component, as the WebDataset convention has it. Payloads of
rows that are not wanted are passed over unread. A name is only ever text: nothing is written under it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.errors import PipelineError
from pipeline.source.config import WebDatasetSource
from pipeline.source.fields import canonical, orientation_of, parse_caption, parse_label, parse_object, pick_extra
from pipeline.source.listing import Entry
from pipeline.source.ranges import Ranges
from pipeline.source.reasons import Reason
from pipeline.source.remote import Failure, failure_of, open_file
from pipeline.source.rows import EndOfUnit, SourceRow
from pipeline.source.tar import Member, TarError, members
from pipeline.storage import Root

_MAX_TEXT_BYTES = 1 << 20
_TEXTS = ("txt", "json", "cls")


@dataclass
class _Sample:
    base: str
    row: int
    parts: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    duplicate: bool = False


def read_tars(
    root: Root, source: WebDatasetSource, entries: Sequence[Entry], wanted: Ranges
) -> Iterator[SourceRow | EndOfUnit]:
    """Rows of the tars one after the other; `EndOfUnit` last, unless the ranges ended before."""
    row = 0
    for entry in entries:
        if wanted.beyond(row):
            return
        row = yield from _read_tar(root, source, entry, row, wanted)
    if wanted.open_ended:
        yield EndOfUnit(row)


def _read_tar(
    root: Root, source: WebDatasetSource, entry: Entry, row: int, wanted: Ranges
) -> Generator[SourceRow, None, int]:
    """Rows of one tar, numbered from `row`; returns the number after the last."""
    try:
        with open_file(root, entry.key, entry.size_bytes) as file:
            for sample in _samples(file, source, row, wanted):
                row = sample.row + 1
                if sample.row in wanted:
                    yield _to_row(sample, source, entry)
                if wanted.beyond(row):
                    return row
            return row
    except PipelineError:
        raise
    except _Cut as cut:
        row, failure = cut.row, cut.failure
    except Exception as error:  # noqa: BLE001 - stores raise anything; the failure becomes a row
        failure = failure_of(error)
    if row in wanted:
        key = f"{entry.key}/?{row}"
        yield SourceRow.without_image(row, key, failure.reason, failure.message, source.name)
    return row + 1


class _Cut(Exception):
    """The tar ended too early; `row` is the number of the row that stands for the lost rest."""

    def __init__(self, row: int, failure: Failure) -> None:
        super().__init__(failure.message)
        self.row, self.failure = row, failure


def _samples(file: BinaryIO, source: WebDatasetSource, row: int, wanted: Ranges) -> Iterator[_Sample]:
    """Groups of members; a sample that the damage cuts in two is lost with the rest, never half used."""
    current: _Sample | None = None
    seen: set[int] = set()
    try:
        for member in members(file):
            base, extension = _split(member.name)
            if not base or base.endswith("/"):
                continue
            if current is None or current.base != base:
                if current is not None:
                    yield current
                    row += 1
                current = _Sample(base, row)
                mark = int.from_bytes(hashlib.blake2b(base.encode("utf-8", "replace"), digest_size=8).digest(), "big")
                current.duplicate = mark in seen
                seen.add(mark)
            if row in wanted:
                _collect(current, member, extension, source)
    except TarError as error:
        raise _Cut(row, Failure(Reason.CORRUPT_CONTAINER, str(error))) from None
    except PipelineError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise _Cut(row, failure_of(error)) from None
    if current is not None:
        yield current


def _split(name: str) -> tuple[str, str]:
    name = name.removeprefix("./")
    directory, slash, last = name.rpartition("/")
    base, _, extension = last.partition(".")
    return directory + slash + base, extension.lower()


def _collect(sample: _Sample, member: Member, extension: str, source: WebDatasetSource) -> None:
    if extension in source.images:
        if member.size > source.max_bytes:
            message = f"{member.size} bytes, over source.max_bytes {source.max_bytes}"
            sample.failures[extension] = Failure(Reason.TOO_MANY_BYTES, message)
        else:
            sample.parts[extension] = member.read()
    elif extension in _TEXTS:
        if member.size > _MAX_TEXT_BYTES:
            message = f"{member.name} has {member.size} bytes, over {_MAX_TEXT_BYTES}"
            sample.failures[extension] = Failure(Reason.BAD_METADATA, message)
        else:
            sample.parts[extension] = member.read()


def _to_row(sample: _Sample, source: WebDatasetSource, entry: Entry) -> SourceRow:
    key = f"{entry.key}/{sample.base}"

    def without(reason: Reason, message: str) -> SourceRow:
        safe = key.encode("utf-8", "backslashreplace").decode()
        return SourceRow.without_image(sample.row, safe, reason, message, source.name)

    if sample.base.startswith("/") or ".." in sample.base.split("/") or not _is_text(sample.base):
        return without(Reason.UNSAFE_NAME, "member names are relative UTF-8 paths without '..'")
    if sample.duplicate:
        key += f"?{sample.row}"
        return without(Reason.DUPLICATE_KEY, "an earlier sample of this tar has the same key")
    image = next((e for e in source.images if e in sample.parts or e in sample.failures), None)
    failed = next((sample.failures[e] for e in (image, *_TEXTS) if e in sample.failures), None)
    if failed is not None:
        return without(failed.reason, failed.message)
    if image is None:
        return without(Reason.NO_IMAGE, f"no member ends in one of {', '.join(source.images)}")
    try:
        return _with_texts(sample, source, key, sample.parts[image])
    except (ValueError, UnicodeError) as error:
        return without(Reason.BAD_METADATA, str(error))


def _with_texts(sample: _Sample, source: WebDatasetSource, key: str, image: bytes) -> SourceRow:
    record = parse_object(sample.parts["json"]) if "json" in sample.parts else {}
    caption = parse_caption(record.get(source.caption)) if source.caption else None
    if source.caption and "txt" in sample.parts:
        caption = sample.parts["txt"].decode("utf-8-sig")
    label = parse_label(record.get(source.label), source.classes) if source.label else None
    if source.label and "cls" in sample.parts:
        label = parse_label(sample.parts["cls"].decode("utf-8-sig").strip(), source.classes)
    extra = pick_extra(record, source.extra, (source.caption, source.label))
    row = SourceRow(sample.row, key, image, caption, label, canonical(extra) if extra else None, source=source.name)
    row.exif_orientation = orientation_of(record.get("exif"))
    status = record.get("status")
    if isinstance(status, str) and status != "success":
        return SourceRow.without_image(sample.row, key, Reason.SOURCE_STATUS, f"status is {status!r}", source.name)
    return row


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name
