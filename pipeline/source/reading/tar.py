"""A tar archive read from front to back: names and sizes of its members, payloads only when asked for.

Nothing is ever written to disk, links and devices are passed over, and nothing is trusted: extended headers are
bounded, holes of sparse files are never filled, a compressed archive may not unpack to more than 100 times its size,
checksums are checked by the standard library's header parser, and an archive that ends without its end-of-archive
block is reported. Understands ustar, GNU long names and pax paths and sizes (POSIX.1-2001).
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

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
    stream, packed = _unpacked(file)
    stored = _size(file)
    end = max(_FREE_BYTES, _MAX_RATIO * stored) if packed else stored
    name: str | None = None
    size: int | None = None
    while True:
        header = _header(_read(stream, _BLOCK))
        if header is None:
            return
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            body = _extended(stream, header)
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


def _size(file: BinaryIO) -> int:
    at = file.tell()
    end = file.seek(0, 2)
    file.seek(at)
    return end


def _unpacked(file: BinaryIO) -> tuple[BinaryIO, bool]:
    magic = file.read(2)
    file.seek(0)
    return (cast(BinaryIO, gzip.GzipFile(fileobj=file)), True) if magic == b"\x1f\x8b" else (file, False)


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


def _extended(stream: BinaryIO, header: tarfile.TarInfo) -> bytes:
    if header.size > _MAX_EXTENDED_BYTES:
        raise TarError(f"an extended header of {header.size} bytes, over {_MAX_EXTENDED_BYTES}")
    body = _read(stream, header.size + -header.size % _BLOCK)[: header.size]
    if len(body) < header.size:
        raise TarError("the archive ends inside an extended header")
    return body


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
