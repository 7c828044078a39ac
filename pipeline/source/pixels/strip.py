"""A file cut down to what its decoder needs, with the orientation and profile that were read on the way.

    bytes --walk the segments, chunks or blocks--> Stripped(data, profile, orientation, frame)

Decoders and their Python wrappers parse metadata in ways that are quadratic (thousands of EXIF segments or comment
blocks), unbounded (compressed texts) or strict beyond reason (a checksum of a text). Nothing here is: every walk is
linear in the bytes, every text that is unpacked has a limit, and what is broken beside the picture is left out.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, JpegImagePlugin

from pipeline.source.reasons import DecodeError, Reason

MAX_PROFILE_BYTES = 4 << 20
_MAX_TEXT_BYTES = 4 << 20

# A marker that is followed by a length: not 00 (an escaped FF), 01 and D0-D8 (bare), FF (filling).
_JPEG_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
JPEG_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_NAME = re.compile(rb"[A-Za-z]{4}")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


@dataclass(frozen=True)
class Stripped:
    """What is left for the decoder, and what the rest of the file said.

    orientation: the EXIF orientation 1..8, or None where the file has none; frame: (left, top, right, bottom) of the
    first picture of a GIF on its canvas.
    """

    data: bytes
    profile: bytes | None = None
    orientation: int | None = None
    frame: tuple[int, int, int, int] | None = None


def exif_orientation(block: bytes | None) -> int | None:
    """The orientation 1..8 of an EXIF block, with or without its "Exif" prefix; None without a valid one."""
    block = (block or b"").removeprefix(_EXIF)
    if block[:4] not in (b"II*\0", b"MM\0*"):
        return None
    order = "<" if block[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", block, at)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], block, at + 8)
                return int(value) if 1 <= value <= 8 else None
    except (struct.error, KeyError):
        pass  # broken metadata are not broken pixels
    return None


def xmp_orientation(packet: bytes | None) -> int | None:
    """The orientation that an XMP packet names, or None."""
    found = _XMP_ORIENTATION.search(packet or b"")
    return int(found[1]) if found else None


# -- JPEG ----------------------------------------------------------------------------------------------------


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of every segment with a length, up to the first scan or the end of the image."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker = found[1][0]
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        if marker == _END_OF_IMAGE or length < 2:
            return
        at = found.end() + length
        yield marker, found.start(), at
        if marker == _START_OF_SCAN:
            return


def strip_jpeg(data: bytes) -> Stripped:
    """Without applications' segments and comments, save JFIF's and Adobe's, which say what the samples mean."""
    kept, exif, xmp = [b"\xff\xd8"], None, None
    profile: dict[int, bytes] = {}
    parts = 0
    for marker, start, end in jpeg_segments(data):
        if marker == _START_OF_SCAN:
            kept.append(data[start:])
            whole = b"".join(profile[i] for i in sorted(profile)) if set(profile) == set(range(1, parts + 1)) else b""
            return Stripped(b"".join(kept), whole or None, exif_orientation(exif) or xmp_orientation(xmp))
        if marker in (0xE1, 0xE2):
            body = data[start + 4 : end]
            if marker == 0xE1 and exif is None and body.startswith(_EXIF):
                exif = body
            elif marker == 0xE1 and xmp is None and body.startswith(_XMP):
                xmp = body
            elif marker == 0xE2 and len(body) > 14 and body.startswith(_ICC):
                profile[body[12]], parts = body[14:], body[13]
        elif marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            if marker in JPEG_FRAMES:
                _check_jpeg_frame(marker, data[start + 4 : end])
            kept.append(data[start:end])
    raise DecodeError(Reason.TRUNCATED, "the file ends before the first scan of the JPEG")


def _check_jpeg_frame(marker: int, frame: bytes) -> None:
    if len(frame) < 6:
        raise DecodeError(Reason.CORRUPT, "the JPEG's frame header is too short")
    if marker in (0xC3, 0xC7, 0xCB, 0xCF) or frame[0] != 8 or frame[5] not in (1, 3, 4):
        what = f"SOF{marker - 0xC0}, {frame[0]} bits, {frame[5]} components"
        raise DecodeError(
            Reason.UNSUPPORTED_CODING, f"a JPEG of {what}: read are lossy ones of 8 bits with 1, 3 or 4"
        )


# -- PNG -----------------------------------------------------------------------------------------------------


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of every chunk's content up to the end chunk; the last one may reach beyond the file."""
    at = 8
    while at + 8 <= len(data):
        name, start = data[at + 4 : at + 8], at + 8
        if name == b"IEND" or not _PNG_NAME.fullmatch(name):
            return
        at = start + int.from_bytes(data[at : at + 4], "big") + 4
        yield name, start, at - 4


def strip_png(data: bytes) -> Stripped:
    """With header, palette, transparency and image data only: of an animation the still picture, as one chunk."""
    kept: dict[bytes, bytes] = {}
    texts: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    in_pixels = False
    for name, start, end in png_chunks(data):
        if name == b"IDAT":
            if in_pixels or not pixels:
                pixels.append(data[start:end])
                in_pixels = True
            continue
        in_pixels = False
        if name not in (b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", *_PNG_TEXTS):
            continue
        content = data[start:end]
        if int.from_bytes(data[end : end + 4], "big") != zlib.crc32(name + content):
            if name in (b"IHDR", b"PLTE"):
                raise DecodeError(Reason.CORRUPT, f"wrong checksum of the PNG's {name.decode()}")
        elif name in _PNG_TEXTS:
            _keep_text(name, content, texts)
        else:
            kept.setdefault(name, content)
    header = kept.get(b"IHDR", b"")
    if len(header) != 13 or not pixels:
        lacking = "header" if len(header) != 13 else "image data"
        raise DecodeError(Reason.TRUNCATED, f"the file ends before the PNG's {lacking}")
    chunks = [(b"IHDR", header)]
    if b"PLTE" in kept:
        chunks.append((b"PLTE", kept[b"PLTE"]))
    if b"tRNS" in kept and header[9] in (0, 2, 3):
        chunks.append((b"tRNS", _expanded_key(kept[b"tRNS"], header[8], header[9])))
    chunks += [(b"IDAT", b"".join(pixels)), (b"IEND", b"")]
    orientation = exif_orientation(kept.get(b"eXIf"))
    if not orientation:
        # ImageMagick's EXIF text: a name and a length on lines of their own, then hexadecimal digits.
        digits = b"".join(texts.get(b"Raw profile type exif", b"").split(b"\n")[3:])
        with contextlib.suppress(ValueError):
            orientation = exif_orientation(bytes.fromhex(digits.decode("ascii")))
    return Stripped(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            b"".join((struct.pack(">I", len(content)), name, content, struct.pack(">I", zlib.crc32(name + content))))
            for name, content in chunks
        ),
        _unpacked(kept.get(b"iCCP", b"").partition(b"\0")[2], MAX_PROFILE_BYTES),
        orientation or xmp_orientation(texts.get(b"XML:com.adobe.xmp")),
    )


def _expanded_key(key: bytes, bits: int, colour: int) -> bytes:
    """A transparent colour in the range that Pillow gives samples of under 8 bits; palettes' alpha as it is."""
    if colour == 3 or bits == 16:
        return key
    scale = {2: 85, 4: 17}.get(bits, 1)
    values = (int.from_bytes(key[at : at + 2], "big") & ((1 << bits) - 1) for at in range(0, len(key) // 2 * 2, 2))
    return b"".join((value * scale).to_bytes(2, "big") for value in values)


def _unpacked(packed: bytes, limit: int) -> bytes | None:
    """A compression method (0: zlib) and the bytes that follow it, unpacked; None for more than `limit` or damage."""
    if packed[:1] != b"\0":
        return None
    unpack = zlib.decompressobj()
    try:
        content = unpack.decompress(packed[1:], limit)
    except zlib.error:
        return None
    return content if unpack.eof else None


def _keep_text(name: bytes, content: bytes, texts: dict[bytes, bytes]) -> None:
    """The texts in which orientations are found; no other is unpacked."""
    keyword, _, rest = content.partition(b"\0")
    if keyword not in (b"XML:com.adobe.xmp", b"Raw profile type exif") or keyword in texts:
        return
    text: bytes | None = rest
    if name == b"zTXt":
        text = _unpacked(rest, _MAX_TEXT_BYTES)
    elif name == b"iTXt":
        fields = rest[2:].split(b"\0", 2)
        text = fields[2] if len(fields) == 3 else None
        if text is not None and rest[:1] == b"\1":
            text = _unpacked(rest[1:2] + text, _MAX_TEXT_BYTES)
    if text is not None:
        texts[keyword] = text


# -- GIF -----------------------------------------------------------------------------------------------------


def gif_blocks(data: bytes) -> Iterator[tuple[int, int]]:
    """(kind, position) of every sub-block and block up to the first picture, whose kind is 0x2C."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    while at < len(data):
        kind = data[at]
        yield kind, at
        if kind in (0x2C, 0x3B):
            return
        at += 1
        if kind != 0x21:
            continue  # filling
        at += 1
        while at < len(data) and (size := data[at]):
            yield 0, at
            at += 1 + size
        at += 1


def strip_gif(data: bytes) -> Stripped:
    """Without comments and other extensions, save the graphic control of the first picture."""
    control = b""
    for kind, at in gif_blocks(data):
        if kind == 0x21 and data[at + 1 : at + 3] == b"\xf9\x04":
            control = data[at : at + 7] + b"\0"
        if kind == 0x2C and at + 10 <= len(data):
            left, top, width, height = struct.unpack_from("<4H", data, at + 1)
            palette_end = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
            frame = (left, top, left + width, top + height)
            return Stripped(data[:palette_end] + control + data[at:], frame=frame)
    raise DecodeError(Reason.TRUNCATED, "the file ends before the first picture of the GIF")


# -- A JPEG that lacks only its end marker, told from one whose data end too early -----------------------------
#
# libjpeg says the same of both. But entropy-coded data that are complete decode to the same picture whatever bytes
# follow them, and of data that are not the missing part does follow those bytes.


_PADDINGS = (b"\x00" * 64, b"\xaa" * 64)
_END = b"\xff\xd9"


def load_without_end(data: bytes, scale: int) -> JpegImagePlugin.JpegImageFile | None:
    """The decoded picture of a JPEG that lacks its end marker and nothing else, else None."""
    if not _all_scans(data):
        return None
    first, second = (load(data.rstrip(b"\xff") + padding + _END, scale) for padding in _PADDINGS)
    return first if first.tobytes() == second.tobytes() else None


def load(data: bytes, scale: int) -> JpegImagePlugin.JpegImageFile:
    """Decode; with `scale` 2, 4 or 8 libjpeg shrinks the picture on the way."""
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))
    image.load()
    return image


def _all_scans(data: bytes) -> bool:
    """Whether scans have begun for every coefficient of every component, down to its last bit (ITU T.81, G.1)."""
    missing: dict[int, set[int]] = {}
    for marker, start, end in jpeg_segments(data):
        if marker in JPEG_FRAMES:
            missing = {component: set(range(64)) for component in data[start + 10 : end : 3]}
    at = -1
    while (at := data.find(b"\xff\xda", at + 1)) >= 0:
        number = data[at + 4] if at + 4 < len(data) else 0
        header = data[at + 5 : at + 8 + 2 * number]
        if len(header) < 3 + 2 * number or header[-1] & 15:
            continue  # a scan of upper bits only
        for component in header[: 2 * number : 2]:
            missing.get(component, set()).difference_update(range(header[-3], header[-2] + 1))
    return bool(missing) and not any(missing.values())
