"""Samples out of tar shards: neighbouring members of one basename form a sample.

    dir/0001.jpg + dir/0001.txt + dir/0001.json + dir/0001.cls  ->  key "shard.tar/dir/0001"

The basename ends at the first dot of the last path component, as the WebDataset convention has it. Payloads of
rows that are not wanted are passed over unread. A name is only ever text: nothing is written under it.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import tarfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from pipeline.errors import PipelineError
from pipeline.source.config import WebDatasetSource
from pipeline.source.reading.filters import keeps
from pipeline.source.reading.metadata import (
    MAX_TEXT_BYTES,
    canonical,
    orientation_of,
    parse_caption,
    parse_label,
    parse_object,
    pick_extra,
)
from pipeline.source.reading.rows import EndOfUnit, Entry, Failure, Ranges, SourceRow, failure_of, open_file
from pipeline.source.reasons import Reason
from pipeline.storage.errors import ObjectChanged
from pipeline.storage.root import Root

# -- A tar archive read from front to back: names and sizes of its members, payloads only when asked for -------
#
# Nothing is ever written to disk, links and devices are passed over, and nothing is trusted: extended headers are
# bounded, holes of sparse files are never filled, a compressed archive may not unpack to over 100 times its size,
# checksums are checked by the standard library's header parser, and an archive that ends without its end-of-archive
# block is reported. Understands ustar, GNU long names and pax paths and sizes (POSIX.1-2001).


_BLOCK = 512
_MAX_EXTENDED_BYTES = 1 << 20
_SKIP_BYTES = 1 << 20
_MAX_RATIO, _FREE_BYTES = 100, 64 << 20  # packed images hardly shrink; a small archive may be padding
_DATA_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_BODILESS_TYPES = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


class TarError(Exception):
    """The archive is damaged from here on."""


@dataclass
class Member:
    """One file in the archive; `read` works until the next member is asked for."""

    name: str
    size: int
    _file: BinaryIO
    _left: int

    def read(self) -> bytes:
        """The payload; TarError when the archive ends inside it."""
        data = _read(self._file, self.size)
        self._left = 0
        if len(data) < self.size:
            raise TarError(f"the archive ends inside {self.name}: {len(data)} of {self.size} bytes")
        return data


def members(file: BinaryIO) -> Iterator[Member]:
    """The regular members in order; TarError where the archive cannot be followed any further."""
    magic = file.read(2)
    stored = file.seek(0, 2)
    file.seek(0)
    packed = magic == b"\x1f\x8b"
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
    end = max(_FREE_BYTES, _MAX_RATIO * stored) if packed else stored
    name: str | None = None
    size: int | None = None
    while True:
        header = _header(_read(stream, _BLOCK))
        if header is None:
            return
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if header.size > _MAX_EXTENDED_BYTES:
                raise TarError(f"an extended header of {header.size} bytes, over {_MAX_EXTENDED_BYTES}")
            body = _read(stream, header.size + -header.size % _BLOCK)[: header.size]
            if len(body) < header.size:
                raise TarError("the archive ends inside an extended header")
            _check_end(stream, 0, end, packed=packed)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                name, size = _pax(body, name, size)
            continue
        length = 0 if header.type in _BODILESS_TYPES else (header.size if size is None else size)
        member = Member(header.name if name is None else name, length, stream, length)
        if header.type in _DATA_TYPES:
            yield member
        left = member._left + -length % _BLOCK
        _check_end(stream, left, end, packed=packed)
        _skip(stream, left, seekable=not packed)
        if header.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            name, size = None, None


def _check_end(stream: BinaryIO, ahead: int, end: int, *, packed: bool) -> None:
    """TarError where `ahead` more bytes lie beyond what the archive holds, or may unpack to."""
    if stream.tell() + ahead > end:
        problem = f"unpacks to more than {end} bytes, {_MAX_RATIO} times its size" if packed else "was cut off"
        raise TarError(f"the archive {problem}")


def _read(stream: BinaryIO, size: int) -> bytes:
    try:
        return stream.read(size)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TarError(f"the compressed archive is damaged: {error}") from None


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The parsed header, or None at the end-of-archive block."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if block == bytes(_BLOCK):
            return None
        if not block:
            raise TarError("the archive has no end-of-archive block: it was cut off") from None
        raise TarError(f"no valid header: {error}") from None
    except (ValueError, OverflowError) as error:
        raise TarError(f"no valid header: {error}") from None
    if header.size < 0:
        raise TarError(f"{header.name} has a negative size")
    return header


def _pax(body: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Path and size out of pax records: `length key=value\\n`, the length counting the whole record."""
    at = 0
    while at < len(body):
        length, space, _ = body[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            raise TarError("an extended header cannot be read")
        record = body[at + len(length) + 1 : at + int(length)].rstrip(b"\n")
        key, _, value = record.partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise TarError("an extended header holds no valid size")
            size = int(value)
        at += int(length)
    return name, size


def _skip(stream: BinaryIO, length: int, *, seekable: bool) -> None:
    if seekable:
        stream.seek(length, 1)
        return
    while length > 0:  # unpacking is the only way forward in a compressed archive
        part = _read(stream, min(length, _SKIP_BYTES))
        if not part:
            return
        length -= len(part)


_log = logging.getLogger(__name__)

_MAX_NAME = 4096
_MAX_SAMPLES = 1 << 21  # of one tar: their names are remembered, to tell duplicates
_TEXTS = ("txt", "json", "cls")


@dataclass
class _Sample:
    base: str
    row: int
    parts: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    image: str | None = None  # the extension of the image to be taken
    duplicate: bool = False


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
        for member in members(file):
            directory, slash, last = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = last.partition(".")
            base, extension = directory + slash + stem, extension.lower()
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
                if len(seen) > _MAX_SAMPLES:
                    raise TarError(f"more than {_MAX_SAMPLES} samples in one tar")
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


def _collect(sample: _Sample, member: Member, extension: str, source: WebDatasetSource) -> None:
    if extension in source.images:
        # Of several images of a sample only the one that will be taken is held.
        rank = source.images.index(extension)
        if sample.image is not None and rank > source.images.index(sample.image):
            return
        if sample.image is not None:
            sample.parts.pop(sample.image, None)
        sample.image = extension
        _take(sample, member, extension, source.max_bytes, Reason.TOO_MANY_BYTES)
    elif extension in _TEXTS:
        _take(sample, member, extension, MAX_TEXT_BYTES, Reason.BAD_METADATA)


def _take(sample: _Sample, member: Member, extension: str, limit: int, reason: Reason) -> None:
    sample.parts.pop(extension, None)
    sample.failures.pop(extension, None)
    if member.size > limit:
        rule = "source.max_bytes " if reason is Reason.TOO_MANY_BYTES else ""
        message = f"{member.name[:200]} has {member.size} bytes, over {rule}{limit}"
        sample.failures[extension] = Failure(reason, message)
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
        return without(Reason.DUPLICATE_KEY, "an earlier sample of this tar has the same key")
    unread = next((sample.failures[e] for e in _TEXTS if e in sample.failures), None)
    if unread is not None:
        return without(unread.reason, unread.message)
    try:
        texts = _Texts.of(sample, source)
        if texts.status not in (None, "success"):
            return without(Reason.SOURCE_STATUS, f"status is {texts.status!r}")
        if source.filter is not None and not keeps(source.filter, texts.fields):
            return without(Reason.ROW_FILTER, f"not kept by {source.filter}")
        if sample.image is None:
            return without(Reason.NO_IMAGE, f"no member ends in one of {', '.join(source.images)}")
        if sample.image in sample.failures:
            return without(sample.failures[sample.image].reason, sample.failures[sample.image].message)
        caption = parse_caption(texts.fields.get(source.caption)) if source.caption else None
        label = parse_label(texts.fields.get(source.label), source.classes) if source.label else None
        extra = pick_extra(texts.record, source.extra, (source.caption, source.label))
        image, packed = sample.parts[sample.image], canonical(extra) if extra else None
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
        status = record.get("status")
        return _Texts(fields, record, status if isinstance(status, str) else None)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name
