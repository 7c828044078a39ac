"""Images made to hold a worker: this process spends little on any, and what needs longer is where a limit holds."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.source.config import ImageConfig
from pipeline.source.pixels.decode import is_risky, sniff
from pipeline.source.pixels.prepare import Reject, prepare
from pipeline.source.pixels.samples import reduced_profile, to_srgb_transform
from pipeline.source.reading.rows import SourceRow
from tests.security import hostile_images as hostile

pytestmark = pytest.mark.integration

MIB = 1 << 20
CONFIG = ImageConfig(resolution=16, max_upscale=1e6, decode_cpu_s=10.0)

# What each costs where it is read as it stands: 8.6 s for the first, over a minute for the second and the fifth.
ATTACKS: dict[str, Callable[[], bytes]] = {
    "a program in a profile": lambda: hostile.png_of_profile(hostile.with_tags({b"D2B1": hostile.program(20_000)})),
    "a long program": lambda: hostile.png_of_profile(hostile.with_tags({b"D2B1": hostile.program(100_000)})),
    "a program in a table's place": lambda: hostile.png_of_profile(
        hostile.with_tags({b"A2B0": hostile.program(100_000), b"D2B0": hostile.program(100_000)})
    ),
    "long curves": lambda: hostile.png_of_profile(
        hostile.with_tags(dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), hostile.curve(600_000)))
    ),
    "EXIF segments": lambda: hostile.jpeg_of_exif_segments(16 * MIB),
    "ICC segments": lambda: hostile.jpeg_with((b"\xff\xe2\0\x10ICC_PROFILE\0" + b"\1\1") * (4 * MIB // 18)),
    "filling between segments": lambda: hostile.jpeg_with(b"\xff" * (15 * MIB)),
    "EXIF entries": lambda: hostile.webp_with_exif(hostile.exif_of_overlapping_entries(4 * MIB)),
    "a comment in pieces": lambda: hostile.gif_of_comments(15 * MIB),
    "comments": lambda: hostile.gif_of_comments(4 * MIB).replace(b"\x04abcd", b"\0!\xfe\0!"),
    "chunks": lambda: hostile.png_of_chunks(15 * MIB),
    "texts": lambda: hostile.png_of_chunks(4 * MIB, b"tEXt"),
    "data in bytes": lambda: hostile.png_of_tiny_data(15 * MIB),
    "frames": lambda: hostile.webp_of_frames(4 * MIB),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_image_holds_the_worker(name):
    data = ATTACKS[name]()
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    result = prepare(SourceRow(0, "k", data), CONFIG)
    assert time.process_time() - started < 0.5 + 0.05 * len(data) / MIB, "CPU seconds of this process"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size) << 10 < 16 * MIB + 3 * len(data)
    if isinstance(result, Reject):
        assert result.reason in ("corrupt", "truncated", "decode_timeout")
    else:
        assert result[0].pixels.shape == (16, 16, 3)


def test_many_parts_go_to_a_child_and_few_do_not():
    for name, kind in (("EXIF segments", "JPEG"), ("a comment in pieces", "GIF"), ("chunks", "PNG")):
        data, plain = ATTACKS[name](), hostile.encoded(kind)
        assert is_risky(data, sniff(data))
        assert not is_risky(plain, sniff(plain))


def test_a_profile_keeps_its_colours_without_its_program():
    wide = {b"rXYZ": b"XYZ " + bytes(4) + struct.pack(">3i", 40_000, 18_000, 1_000)}
    plain = hostile.with_tags(wide)
    programmed = hostile.with_tags({**wide, b"D2B1": hostile.program(10), b"D2B0": hostile.program(10)})
    picture = hostile.PICTURE
    shown = [
        np.asarray(ImageCms.applyTransform(picture, to_srgb_transform(profile, "RGB")))
        for profile in (plain, programmed)
    ]
    assert np.array_equal(*shown)
    assert not np.array_equal(shown[0], np.asarray(picture)), "the profile changes colours"


def test_tables_of_tags_beyond_reason_are_no_profiles():
    profile = hostile.with_tags({})
    for count in (101, 2**31):
        assert reduced_profile(profile[:128] + count.to_bytes(4, "big") + profile[132:]) is None
    assert reduced_profile(profile[:130]) is None
    entry = profile.index(b"rXYZ")
    for start, size in ((len(profile), 20), (len(profile) - 19, 20), (2**32 - 1, 2**32 - 1)):
        outside = profile[:entry] + struct.pack(">4sII", b"rXYZ", start, size) + profile[entry + 12 :]
        assert b"rXYZ" not in reduced_profile(outside)
    assert b"rXYZ" in reduced_profile(profile)


def test_pixels_do_not_depend_on_what_lies_around_them():
    plain = {kind: hostile.encoded(kind) for kind in ("PNG", "JPEG", "GIF")}
    around = {
        "PNG": hostile.png_of_chunks(2000),
        "JPEG": hostile.jpeg_of_exif_segments(2000),
        "GIF": hostile.gif_of_comments(2000),
    }
    for kind, data in plain.items():
        results = [prepare(SourceRow(0, "k", d), CONFIG) for d in (data, around[kind])]
        assert np.array_equal(results[0][0].pixels, results[1][0].pixels), kind


def test_memory_for_grey_of_sixteen_bits_stays_near_its_size():
    """In a child, whose largest size is its own: 10 megapixels within 12 bytes each."""
    side = 3200
    values = Image.fromarray(np.zeros((side, side), np.uint16))
    data = hostile.encoded("PNG", values, compress_level=1)
    code = (
        "import sys, resource; from pipeline.source.config import ImageConfig;"
        "from pipeline.source.pixels.prepare import prepare; from pipeline.source.reading.rows import SourceRow;"
        "data = sys.stdin.buffer.read(); config = ImageConfig(resolution=64, isolate='never');"
        "prepare(SourceRow(0, 'k', data[:100]), config); size = lambda: resource.getrusage(0).ru_maxrss;"
        "before = size(); rows = prepare(SourceRow(0, 'k', data), config); assert len(rows) == 1;"
        "print((size() - before) << 10)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert int(done.stdout) < 12 * side * side
