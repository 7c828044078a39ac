"""A tar archive read from front to back: names and sizes of its members, payloads only when asked for.

    Archive(file).members() -> Member .read()        a link is a member, and reads what it leads to

Nothing is ever written to disk, devices are passed over, and nothing is trusted: extended headers are bounded, holes
of sparse files are never filled, a compressed archive may not unpack to over 100 times its size, checksums are
checked by the standard library's header parser, links lead to members of the same archive and nowhere else, and an
archive that ends without its end-of-archive block is reported. Understands ustar, GNU long names, pax paths and sizes
(POSIX.1-2001), archives joined end to end, and gzip, bzip2, xz and Zstandard around all of it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

SUFFIXES = tuple(
    f".{name}"
    for name in ("tar", "tar.gz", "tgz", "tar.bz2", "tbz2", "tbz", "tar.xz", "txz", "tar.zst", "tar.zstd", "tzst")
)
_BLOCK = 512
_MAX_EXTENDED_BYTES = 1 << 20
_SKIP_BYTES = 1 << 20
_MAX_RATIO, _FREE_BYTES = 100, 64 << 20  # packed images hardly shrink; a small archive may be padding
_MAX_MEMBERS = 1 << 21  # that a link may lead to: their places are remembered once there is one
_MAX_LINKS = 8  # from a link to a link
_DATA_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINK_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_BODILESS_TYPES = (*_LINK_TYPES, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)

# By magic bytes: what unpacks a file on the way.
_UNPACKERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
}


class TarError(Exception):
    """The archive is damaged from here on."""


class LinkError(Exception):
    """A link leads to nothing that can be read."""


@dataclass
class Member:
    """One file in the archive; `read` works until the next member is asked for. link: where one leads that is one."""

    name: str
    size: int
    link: str | None
    _archive: Archive
    _left: int

    def read(self) -> bytes:
        """The payload; TarError when the archive ends inside it."""
        data = self._archive.take(self.size)
        self._left = 0
        if len(data) < self.size:
            raise TarError(f"the archive ends inside {self.name}: {len(data)} of {self.size} bytes")
        return data

    def read_link(self, max_bytes: int) -> bytes | None:
        """What the link leads to; None where that is more than `max_bytes`, LinkError where it leads nowhere."""
        assert self.link is not None
        return self._archive.linked(self.link, max_bytes)


class Archive:
    """The members of one open file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        head = file.read(6)
        stored = file.seek(0, io.SEEK_END)
        file.seek(0)
        unpacker = next((unpack for magic, unpack in _UNPACKERS.items() if head.startswith(magic)), None)
        self._stream: Any = None if unpacker is None else unpacker(file)
        self._end = stored if unpacker is None else max(_FREE_BYTES, _MAX_RATIO * stored)
        self._at = 0
        self._places: dict[str, tuple[int, int] | str] | None = None

    def members(self) -> Iterator[Member]:
        """Regular files and links in order; TarError where the archive cannot be followed any further."""
        name = link = None
        size: int | None = None
        while True:
            header = self._header()
            if header is None:
                return
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                text = self._extension(header.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
                name, link = (text, link) if header.type == tarfile.GNUTYPE_LONGNAME else (name, text)
                continue
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                found = _pax(self._extension(header.size))
                name, link = found.get("path", name), found.get("linkpath", link)
                size = int(found["size"]) if "size" in found else size
                continue
            length = 0 if header.type in _BODILESS_TYPES else (header.size if size is None else size)
            target = (link if link is not None else header.linkname) if header.type in _LINK_TYPES else None
            own = header.name if name is None else name
            if target is not None and header.type == tarfile.SYMTYPE:
                target = posixpath.join(posixpath.dirname(own), target)
            member = Member(own, length, target, self, length)
            if header.type in _DATA_TYPES or target is not None:
                yield member
            left = member._left + -length % _BLOCK
            self._check_end(left)
            self._skip(left)
            if header.type != tarfile.XGLTYPE:
                name = link = size = None

    def take(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        try:
            data: bytes = (self._stream or self._file).read(size)
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, pa.ArrowInvalid, EOFError) as error:
            raise TarError(f"the compressed archive is damaged: {error}") from None
        except OSError as error:  # what bzip2 and Zstandard raise of bad data, and a store that cannot be read
            if self._stream is None or getattr(getattr(self._file, "raw", None), "failed", None) is not None:
                raise
            raise TarError(f"the compressed archive is damaged: {error}") from None
        self._at += len(data)
        return data

    def linked(self, target: str, max_bytes: int) -> bytes | None:
        """The payload of the member that a link names, then on where we were; see `Member.read_link`."""
        if self._stream is not None:
            raise LinkError("a link in a compressed archive, which cannot be read out of turn")
        here = self._at
        try:
            for _ in range(_MAX_LINKS):
                path = posixpath.normpath(target)
                place = self._find(path)
                if place is None:
                    raise LinkError(f"a link to {path[:200]!r}, which is no member of this archive")
                if isinstance(place, str):
                    target = place
                    continue
                start, size = place
                if size > max_bytes:
                    return None
                self._seek(start)
                return self.take(size)
            raise LinkError(f"a link that leads over more than {_MAX_LINKS} links")
        finally:
            self._seek(here)

    def _find(self, path: str) -> tuple[int, int] | str | None:
        """Where a member's payload is, or what it links to. All places are looked up with the first link."""
        if self._places is None:
            self._places = {}
            self._seek(0)
            try:
                for member in self.members():
                    # The first of a name: the second is refused as a row, too.
                    place = (self._at, member.size) if member.link is None else member.link
                    self._places.setdefault(posixpath.normpath(member.name), place)
                    if len(self._places) > _MAX_MEMBERS:
                        break
            except TarError:
                pass  # the way through the archive ends there, too, and says so then
        return self._places.get(path)

    def _seek(self, position: int) -> None:
        self._file.seek(position)
        self._at = position

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None at the end: of the file, after an end-of-archive block with no archive behind it."""
        block, ended = self.take(_BLOCK), False
        while block == bytes(_BLOCK):
            block, ended = self.take(_BLOCK), True
            self._check_end(0)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            if ended:
                return None  # what is no archive after the end of one is no part of it
            if not block:
                raise TarError("the archive has no end-of-archive block: it was cut off") from None
            raise TarError(f"no valid header: {error}") from None
        if header.size < 0:
            raise TarError(f"{header.name} has a negative size")
        return header

    def _extension(self, size: int) -> bytes:
        """The body of an extended header."""
        if size > _MAX_EXTENDED_BYTES:
            raise TarError(f"an extended header of {size} bytes, over {_MAX_EXTENDED_BYTES}")
        body = self.take(size + -size % _BLOCK)[:size]
        if len(body) < size:
            raise TarError("the archive ends inside an extended header")
        self._check_end(0)
        return body

    def _check_end(self, ahead: int) -> None:
        """TarError where `ahead` more bytes lie beyond what the archive holds, or may unpack to."""
        if self._at + ahead > self._end:
            packed = f"unpacks to more than {self._end} bytes, {_MAX_RATIO} times its size"
            raise TarError(f"the archive {'was cut off' if self._stream is None else packed}")

    def _skip(self, length: int) -> None:
        if self._stream is None:
            self._seek(self._at + length)
            return
        while length > 0:  # unpacking is the only way forward in a compressed archive
            part = self.take(min(length, _SKIP_BYTES))
            if not part:
                return
            length -= len(part)


def _pax(body: bytes) -> dict[str, str]:
    """Path, link and size out of pax records: `length key=value\\n`, the length counting the whole record."""
    found: dict[str, str] = {}
    at = 0
    while at < len(body):
        length, space, _ = body[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            raise TarError("an extended header cannot be read")
        record = body[at + len(length) + 1 : at + int(length)].rstrip(b"\n")
        key, _, value = record.partition(b"=")
        if key in (b"path", b"linkpath"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise TarError("an extended header holds no valid size")
            found["size"] = value.decode()
        at += int(length)
    return found
