"""Samples out of tar shards: neighbouring members of one name form a sample.

    dir/0001.jpg + dir/0001.txt + dir/0001.json + dir/0001.cls  ->  key "shard.tar/dir/0001"

Every image is a row: the one that a sample's texts belong to, and as a filtered or rejected row each further one.
Payloads of rows that are not wanted are passed over unread. A name is only ever text: nothing is written under it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from pipeline.errors import PipelineError
from pipeline.source.config import WebDatasetSource
from pipeline.source.reading.filters import keeps
from pipeline.source.reading.rows import (
    FAILED_STATUSES,
    MAX_STORED_BYTES,
    MAX_TEXT_BYTES,
    EndOfUnit,
    Entry,
    Failure,
    Ranges,
    SourceRow,
    canonical,
    failure_of,
    open_file,
    orientation_of,
    parse_caption,
    parse_label,
    parse_object,
    pick_extra,
)
from pipeline.source.reading.tar import Archive, LinkError, Member, TarError
from pipeline.source.reasons import Reason
from pipeline.storage.errors import ObjectChanged
from pipeline.storage.root import Root

_log = logging.getLogger(__name__)

_MAX_NAME = 4096
_LOOKED_AT = 1000  # samples that may show that a field is there
_MAX_SAMPLES = 1 << 21  # of one tar: their names are remembered, to tell duplicates
_TEXTS = ("txt", "json", "cls")


@dataclass
class _Sample:
    """Members that belong together; `row` is its picture's, `others` have the rows after it."""

    base: str
    row: int
    duplicate: bool = False
    parts: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    image: str | None = None  # the extension of the image that is taken
    taken: str = ""  # its member's name
    others: list[tuple[str, Reason, str]] = field(default_factory=list)  # (name, reason, message) of further images

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it was of any use so far."""
        return self.image is None and not self.parts and not self.failures

    @property
    def next_row(self) -> int:
        """The number of the row after its last one."""
        return self.row + 1 + len(self.others)


def read_tars(
    root: Root, source: WebDatasetSource, entries: Sequence[Entry], wanted: Ranges
) -> Iterator[SourceRow | EndOfUnit]:
    """Rows of the tars one after the other; `EndOfUnit` last, unless the ranges ended before."""
    row = 0
    for entry in entries:
        if wanted.beyond(row):
            return
        try:
            row = yield from _read_tar(root, source, entry, row, wanted)
        except ObjectChanged as error:
            _log.warning("%s", error)
            return  # nothing is known of the rows after this one
    if wanted.open_ended:
        yield EndOfUnit(row)


def known_fields(root: Root, source: WebDatasetSource, entry: Entry, asked: set[str]) -> tuple[set[str] | None, int]:
    """The fields that the first samples of a tar have, and how many those are; None where it cannot be read.

    Looks no further than it takes to find those `asked` for.
    """
    known: set[str] = set()
    samples = 0
    texts = {"txt": source.caption, "cls": source.label}
    try:
        with open_file(root, entry.key, entry.size_bytes, entry) as file:
            for member in Archive(file).members():
                extension = member.name.rpartition(".")[2].lower()
                samples += extension in source.images
                if samples > _LOOKED_AT or asked <= known:
                    break
                if extension == "json" and member.size <= MAX_TEXT_BYTES:
                    with suppress(ValueError):  # its own row will say so
                        known |= parse_object(member.read()).keys()
                named = texts.get(extension)
                known |= {named} if named else set()
    except PipelineError:
        raise
    except Exception:  # noqa: BLE001 - whoever reads its rows says what is wrong with it
        return None, samples
    return known, min(samples, _LOOKED_AT)


def _read_tar(
    root: Root, source: WebDatasetSource, entry: Entry, row: int, wanted: Ranges
) -> Generator[SourceRow, None, int]:
    """Rows of one tar, numbered from `row`; returns the number after the last.

    Where reading fails, every wanted row that is known to exist is rejected, and one row stands for an end whose
    place is not known: whoever reads that row again reads to the end.
    """
    try:
        with open_file(root, entry.key, entry.size_bytes, entry) as file:
            for sample in _samples(file, source, row, wanted):
                row = sample.next_row
                if sample.row in wanted:
                    yield _to_row(sample, source, entry)
                for place, (name, reason, message) in enumerate(sample.others, sample.row + 1):  # its further images
                    if place in wanted:
                        key = f"{entry.key}/{name[:_MAX_NAME]}?{place}".encode("utf-8", "backslashreplace").decode()
                        yield SourceRow.without_image(place, key, reason, message, source.name)
                if wanted.beyond(row):
                    return row
            return row
    except PipelineError:
        raise
    except _Cut as cut:
        row, failure = cut.row, cut.failure
    except Exception as error:  # noqa: BLE001 - stores raise anything; the failure becomes a row
        failure = failure_of(error)
    for lost in wanted.rest(row):
        key = f"{entry.key}/?{lost}"
        yield SourceRow.without_image(lost, key, failure.reason, failure.message, source.name)
        row = lost + 1
    return row


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
        for member in Archive(file).members():
            name = member.name.removeprefix("./")
            if name.rpartition("/")[2].startswith(".") or name.endswith("/"):
                continue
            base, extension = _split(name, None if current is None else current.base, source)
            if current is None or current.base != base:
                # Parts of no use that stand before a sample, "a.features.npy" before "a.jpg", are some of its own.
                if current is not None and not (current.is_empty and current.base.startswith(f"{base}.")):
                    yield current
                    row = current.next_row
                current = _Sample(base, row)
                mark = int.from_bytes(hashlib.blake2b(base.encode("utf-8", "replace"), digest_size=8).digest(), "big")
                current.duplicate = mark in seen
                seen.add(mark)
                if len(seen) > _MAX_SAMPLES:
                    raise TarError(f"more than {_MAX_SAMPLES} samples in one tar")
            _collect(current, member, extension, source, wanted=row in wanted)
    except TarError as error:
        raise _Cut(row, Failure(Reason.CORRUPT_CONTAINER, str(error))) from None
    except PipelineError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise _Cut(row, failure_of(error)) from None
    if current is not None:
        yield current


def _split(name: str, current: str | None, source: WebDatasetSource) -> tuple[str, str]:
    """(sample, extension) of a member, `current` being the sample that the member before it belongs to.

    A member that goes on with the current sample's name is a part of it: "a.jpg", then "a.txt", "a.features.npy" or
    "a.mask.png". Any other has its sample's name up to the last dot, but where all after an earlier one is listed in
    `source.images`: names may hold dots.
    """
    if current is not None and name.startswith(f"{current}."):
        return current, name[len(current) + 1 :].lower()
    directory, slash, last = name.rpartition("/")
    dots = [at for at, letter in enumerate(last) if letter == "."]
    listed = [at for at in dots if last[at + 1 :].lower() in source.images]
    cut = (listed or dots[-1:] or [len(last)])[0]
    return directory + slash + last[:cut], last[cut + 1 :].lower()


def _collect(sample: _Sample, member: Member, extension: str, source: WebDatasetSource, *, wanted: bool) -> None:
    """Note a member; its payload is read only where the sample's row is wanted."""
    last, name = extension.rpartition(".")[2], member.name.removeprefix("./")
    if extension in source.images:
        rank = source.images.index
        if sample.image == extension:
            sample.others.append((name, Reason.DUPLICATE_KEY, "an earlier member of this tar has the same name"))
        elif sample.image is not None and rank(extension) > rank(sample.image):
            sample.others.append((name, Reason.SECOND_IMAGE, _second(sample.image)))
        else:
            # Of several images of a sample only the one that will be taken is held.
            if sample.image is not None:
                sample.others.append((sample.taken, Reason.SECOND_IMAGE, _second(extension)))
                sample.parts.pop(sample.image, None)
                sample.failures.pop(sample.image, None)
            sample.image, sample.taken = extension, name
            if wanted:
                _take(sample, member, extension, source.max_bytes, Reason.TOO_MANY_BYTES)
    elif last in source.images:
        sample.others.append((name, Reason.SECOND_IMAGE, _second(sample.image)))
    elif extension in _TEXTS and wanted:
        earlier = sample.parts.get(extension)
        _take(sample, member, extension, MAX_TEXT_BYTES, Reason.BAD_METADATA)
        if earlier is not None and sample.parts.get(extension) != earlier:
            message = f"{member.name[:200]} is there twice, with different content"
            sample.failures[extension] = Failure(Reason.BAD_METADATA, message)


def _second(taken: str | None) -> str:
    if taken is None:
        return "its name goes on with that of the member before it, and no extension in source.images is all of that"
    return (
        f"another image of a sample, of which .{taken} is taken: source.images says which extensions are images, the "
        "first of them that a sample has is taken"
    )


def _take(sample: _Sample, member: Member, extension: str, limit: int, reason: Reason) -> None:
    rule = "source.max_bytes " if reason is Reason.TOO_MANY_BYTES else ""
    too_many = Failure(reason, f"{member.name[:200]} has more than {rule}{limit} bytes")
    if member.link is not None:
        try:
            data = member.read_link(limit)
        except LinkError as error:
            sample.failures[extension] = Failure(Reason.MISSING, str(error))
            return
        if data is None:
            sample.failures[extension] = too_many
        else:
            sample.parts[extension] = data
    elif member.size > limit:
        sample.failures[extension] = too_many
    else:
        sample.parts[extension] = member.read()


def _to_row(sample: _Sample, source: WebDatasetSource, entry: Entry) -> SourceRow:
    key = f"{entry.key}/{sample.base}"

    def without(reason: Reason, message: str) -> SourceRow:
        safe = key.encode("utf-8", "backslashreplace").decode()
        return SourceRow.without_image(sample.row, safe, reason, message, source.name)

    if len(sample.base) > _MAX_NAME:
        key = f"{entry.key}/{sample.base[:100]}?{sample.row}"
        return without(Reason.UNSAFE_NAME, f"a member's name has {len(sample.base)} characters, over {_MAX_NAME}")
    if sample.base.startswith("/") or ".." in sample.base.split("/") or not _is_text(sample.base):
        return without(Reason.UNSAFE_NAME, "member names are relative UTF-8 paths without '..'")
    if sample.duplicate:
        key += f"?{sample.row}"
        return without(Reason.DUPLICATE_KEY, _apart(sample))
    unread = next((sample.failures[e] for e in _TEXTS if e in sample.failures), None)
    if unread is not None:
        return without(unread.reason, unread.message)
    try:
        texts = _Texts.of(sample, source)
        if texts.status in FAILED_STATUSES:
            return without(Reason.SOURCE_STATUS, f"{source.status} is {texts.status!r}")
        if source.filter is not None and not keeps(source.filter, texts.fields):
            return without(Reason.ROW_FILTER, f"not kept by {source.filter}")
        if sample.image is None:
            return without(Reason.NO_IMAGE, f"no member ends in one of {', '.join(source.images)}")
        if sample.image in sample.failures:
            return without(sample.failures[sample.image].reason, sample.failures[sample.image].message)
        caption = parse_caption(texts.fields.get(source.caption)) if source.caption else None
        label = parse_label(texts.fields.get(source.label), source.classes) if source.label else None
        extra = pick_extra(texts.record, source.extra, source.caption, (source.label,))
        image, packed = sample.parts[sample.image], canonical(extra, MAX_STORED_BYTES) if extra else None
        row = SourceRow(sample.row, key, image, caption, label, packed, source=source.name)
        row.exif_orientation = orientation_of(texts.record.get("exif"))
        return row
    except (ValueError, UnicodeError) as error:
        return without(Reason.BAD_METADATA, str(error))


@dataclass
class _Texts:
    """What the .json, .txt and .cls members say; `fields` is what a filter sees: .txt and .cls under their names."""

    fields: dict[str, Any]
    record: dict[str, Any]
    status: str | None

    @staticmethod
    def of(sample: _Sample, source: WebDatasetSource) -> _Texts:
        record = parse_object(sample.parts["json"]) if "json" in sample.parts else {}
        fields = dict(record)
        if source.caption and "txt" in sample.parts:
            fields[source.caption] = sample.parts["txt"].decode("utf-8-sig")
        if source.label and "cls" in sample.parts:
            fields[source.label] = parse_label(sample.parts["cls"].decode("utf-8-sig").strip(), source.classes)
        status = record.get(source.status) if source.status else None
        return _Texts(fields, record, status if isinstance(status, str) else None)


def _apart(sample: _Sample) -> str:
    """Why a sample that comes a second time is no row, and what that cost the first."""
    lost = [f".{extension}" for extension in _TEXTS if extension in sample.parts]
    if sample.image is not None or not lost:
        return "an earlier sample of this tar has the same key"
    return (
        f"its image came earlier in this tar, apart from this {' and '.join(lost)}, which is lost to it: members of "
        "a sample must follow each other (tar --sort=name)"
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name
