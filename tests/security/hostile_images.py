"""Small files that cost a decoder much: made on the spot, each of a kind."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

PICTURE = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3))


def encoded(kind: str, picture: Image.Image = PICTURE, **options: object) -> bytes:
    """The picture as a file."""
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def with_tags(tags: dict[bytes, bytes]) -> bytes:
    """Pillow's sRGB profile with further tags, or with others in place of its own."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    every = {}
    for index in range(int.from_bytes(srgb[128:132], "big")):
        name, start, size = struct.unpack_from(">4sII", srgb, 132 + 12 * index)
        every[name] = srgb[start : start + size]
    every |= tags
    at = 132 + 12 * len(every)
    table, contents = struct.pack(">I", len(every)), b""
    for name, content in every.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, at + len(contents), len(content))
        contents += content
    profile = srgb[:128] + table + contents
    return len(profile).to_bytes(4, "big") + profile[4:]


def program(elements: int) -> bytes:
    """A multiProcessElements tag that runs one and the same matrix very often."""
    start = 16 + 8 * elements
    matrix = b"matf" + bytes(4) + struct.pack(">HH", 3, 3)
    matrix += np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0], ">f4").tobytes()
    places = struct.pack(">II", start, len(matrix)) * elements
    return b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, elements) + places + matrix


def curve(points: int) -> bytes:
    """A curve of so many points, rising."""
    return b"curv" + bytes(4) + struct.pack(">I", points) + np.linspace(0, 65535, points).astype(">u2").tobytes()


def table_of_curves(points: int) -> bytes:
    """A mAB tag whose three curves have so many points."""
    curves = curve(points)
    curves += bytes(-len(curves) % 4)
    return b"mAB " + bytes(4) + bytes((3, 3, 0, 0)) + struct.pack(">5I", 32, 0, 0, 0, 0) + 3 * curves


def png_chunk(name: bytes, content: bytes) -> bytes:
    """One chunk."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_with(chunks: bytes) -> bytes:
    """A PNG with more chunks between header and data."""
    data = encoded("PNG")
    return data[:33] + chunks + data[33:]


def jpeg_with(segments: bytes) -> bytes:
    """A JPEG with more segments after its first marker."""
    data = encoded("JPEG")
    return data[:2] + segments + data[2:]


def exif_of_overlapping_entries(size: int) -> bytes:
    """EXIF whose entries, each of its own tag, all claim the whole block."""
    entries = min(64_000, (size - 10) // 12)
    out = b"II*\0\x08\0\0\0" + struct.pack("<H", entries)
    out += b"".join(struct.pack("<HHII", 1000 + tag, 7, size - 10, 8) for tag in range(entries))
    return out.ljust(size, b"\0")


def jpeg_of_exif_segments(size: int) -> bytes:
    """A JPEG of so many bytes of EXIF segments, each of them short."""
    segment = b"\xff\xe1\0\x10Exif\0\0II*\0\x08\0\0\0"[:18]
    return jpeg_with(segment * (size // len(segment)))


def gif_of_comments(size: int) -> bytes:
    """A GIF of so many bytes of one comment in pieces."""
    data = encoded("GIF")
    picture = data.index(b",", 13 + 3 * 256)
    piece = b"\x04abcd"
    return data[:picture] + b"!\xfe" + piece * (size // len(piece)) + b"\0" + data[picture:]


def png_of_chunks(size: int, name: bytes = b"teXt") -> bytes:
    """A PNG of so many bytes of empty chunks."""
    return png_with(png_chunk(name, b"") * (size // 12))


def png_of_tiny_data(size: int) -> bytes:
    """A PNG of so many bytes of image data, one byte to a chunk."""
    side = max(1, int((size / 13 / 3) ** 0.5))
    noise = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    data = encoded("PNG", Image.fromarray(noise))
    packed = zlib.compress(b"".join(b"\0" + line.tobytes() for line in noise))
    chunks = b"".join(png_chunk(b"IDAT", packed[at : at + 1]) for at in range(len(packed)))
    return data[:33] + chunks + png_chunk(b"IEND", b"")


def webp_with_exif(exif: bytes) -> bytes:
    """A WebP with an EXIF block."""
    return encoded("WEBP", exif=exif)


def png_of_profile(profile: bytes) -> bytes:
    """A PNG with a profile."""
    return png_with(png_chunk(b"iCCP", b"p\0\0" + zlib.compress(profile, 9)))


def webp_of_frames(size: int) -> bytes:
    """An animated WebP of so many bytes, its second frame again and again."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded("WEBP", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    last = data.rindex(b"ANMF")
    data += data[last:] * (size // len(data[last:]))
    return data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]
