"""The odd kinds of each format, made on the spot: what viewers show, or a reason that says why not."""

from __future__ import annotations

import itertools
import struct
import sys
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageCms
from source_images import encode, gradient, outcome, pixels_of, reason_of

from pipeline.source.config import ImageConfig
from pipeline.source.pixels.decode import sniff
from pipeline.source.pixels.prepare import POLICY_VERSION, policy_fingerprint

PICTURE = gradient()
SIDE = 16


def chunk(name: bytes, body: bytes, *, crc: int | None = None) -> bytes:
    right = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", right if crc is None else crc)


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def png(
    samples: np.ndarray, bits: int, colour: int, extra: bytes = b"", after: bytes = b"", *, interlaced: bool = False
) -> bytes:
    """A PNG of samples [h, w, bands] that lie in 0..2^bits - 1."""
    height, width, _ = samples.shape
    raw = b""
    for top, left, down, right in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[top::down, left::right]
        if bits == 16:
            lines = part.astype(">u2").reshape(len(part), -1).view(np.uint8)
        else:
            places = np.unpackbits(part.astype(np.uint8)[..., None], axis=3)[..., 8 - bits :]
            lines = np.packbits(places.reshape(len(part), -1), axis=1)
        raw += b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def eight(samples: np.ndarray, bits: int) -> np.ndarray:
    return samples >> 8 if bits == 16 else samples * 255 // ((1 << bits) - 1)


MATTE = (10, 200, 30)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_compared_at_its_own_depth(bits, interlaced):
    top = (1 << bits) - 1
    samples = np.random.default_rng(bits).integers(0, top + 1, (SIDE, SIDE, 1))
    samples[:4] = top // 2
    samples[4:6] = min(top, top // 2 + 1)  # at 16 bits a neighbour of the same upper byte
    for key in {0, top // 2, top}:
        data = png(samples, bits, 0, chunk(b"tRNS", struct.pack(">H", key)), interlaced=interlaced)
        expected = np.where(samples == key, MATTE, eight(samples, bits))
        assert np.array_equal(pixels_of(data, matte=MATTE), expected)
        # Bits beyond the depth say nothing.
        wider = chunk(b"tRNS", struct.pack(">H", key | (0 if bits == 16 else 1 << bits)))
        assert np.array_equal(pixels_of(png(samples, bits, 0, wider), matte=MATTE), expected)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_compared_at_its_own_depth(bits, interlaced):
    samples = np.random.default_rng(bits).integers(0, 1 << bits, (SIDE, SIDE, 3))
    samples[:4] = samples[0, 0]
    samples[4] = samples[0, 0] ^ 1
    key = chunk(b"tRNS", struct.pack(">3H", *samples[0, 0]))
    expected = np.where((samples == samples[0, 0]).all(axis=2, keepdims=True), MATTE, eight(samples, bits))
    assert np.array_equal(pixels_of(png(samples, bits, 2, key, interlaced=interlaced), matte=MATTE), expected)


@pytest.mark.parametrize(("bits", "colour"), [(8, 4), (16, 4), (8, 6), (16, 6)])
def test_alpha_of_png(bits, colour):
    bands = 2 if colour == 4 else 4
    samples = np.random.default_rng(1).integers(0, 1 << bits, (SIDE, SIDE, bands))
    samples[..., -1] = (samples[..., -1] > 1 << (bits - 1)) * ((1 << bits) - 1)
    shown = np.where(samples[..., -1:] > 0, eight(samples[..., :-1], bits), MATTE)
    assert np.array_equal(pixels_of(png(samples, bits, colour), matte=MATTE), shown)
    forbidden = chunk(b"tRNS", struct.pack(">3H", 0, 0, 0))  # a key beside an alpha channel says nothing
    assert np.array_equal(pixels_of(png(samples, bits, colour, forbidden), matte=MATTE), shown)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_png_with_alpha(bits):
    samples = np.random.default_rng(1).integers(0, 1 << bits, (SIDE, SIDE, 1))
    colours = np.random.default_rng(2).integers(0, 256, (1 << bits, 3))
    alpha = chunk(b"tRNS", b"\0\xff")
    expected = np.where(samples == 0, MATTE, colours[samples[..., 0]])
    data = png(samples, bits, 3, chunk(b"PLTE", colours.astype(np.uint8).tobytes()) + alpha)
    assert np.array_equal(pixels_of(data, matte=MATTE), expected)


def plain(extra: bytes = b"", after: bytes = b"") -> bytes:
    return png(PICTURE[:SIDE, :SIDE], 8, 2, extra, after)


def test_texts_and_damage_beside_the_picture_do_not_cost_it():
    long = zlib.compress(b"a" * (40 << 20))
    beside = [
        chunk(b"iTXt", b"k\0\1\0\0\0" + long),
        chunk(b"zTXt", b"k\0\0" + long),
        chunk(b"zTXt", b"k\0\7rubbish"),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long),
        chunk(b"tEXt", b""),
        chunk(b"tEXt", b"k\0v", crc=1),
        chunk(b"tRNS", b"\0\1\0\1\0\1", crc=1),
        chunk(b"iCCP", b"p\0\0" + long),
        chunk(b"iCCP", b"p\0\7" + zlib.compress(b"a")),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(b"a" * 99)[:-4]),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        chunk(b"gAMA", b"", crc=1),
        chunk(b"acTL", b"\0" * 7),
        chunk(b"fcTL", b""),
        chunk(b"prVt", b"own"),
    ]
    for extra in beside:
        for data in (plain(extra), plain(after=extra)):
            assert np.array_equal(pixels_of(data), PICTURE[:SIDE, :SIDE]), extra[:24]
    assert np.array_equal(pixels_of(plain(b"".join(beside))), PICTURE[:SIDE, :SIDE])


def test_a_profile_up_to_the_stated_limit_is_used_and_a_larger_one_ignored():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp0").replace(b"bXYZ", b"rXYZ").replace(b"tmp0", b"bXYZ")
    shown = {}
    for size in (len(swapped), 3 << 20, 5 << 20):
        profile = size.to_bytes(4, "big") + swapped[4:].ljust(size - 4, b"\0")
        shown[size] = pixels_of(plain(chunk(b"iCCP", b"p\0\0" + zlib.compress(profile))))
    assert np.array_equal(shown[3 << 20], shown[len(swapped)])
    assert np.abs(shown[3 << 20] - PICTURE[:SIDE, :SIDE, ::-1]).max() <= 6
    assert np.array_equal(shown[5 << 20], PICTURE[:SIDE, :SIDE])


def test_what_png_cannot_do_without_is_checked():
    data = plain()
    wrong = data[:29] + bytes(4) + data[33:]
    assert reason_of(wrong) == "corrupt"
    palette = png(np.zeros((SIDE, SIDE, 1), int), 8, 3, chunk(b"PLTE", bytes(768), crc=5))
    assert reason_of(palette) == "corrupt"
    assert reason_of(data[:33]) == "truncated"
    assert reason_of(data[:60]) == "truncated"


def test_orientation_is_found_in_every_place_png_has_for_it():
    turned = PICTURE[:SIDE, :SIDE][::-1, ::-1]
    exif = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\3\0\0" + bytes(4)
    packet = b'<x:xmpmeta><rdf tiff:Orientation="3"/></x:xmpmeta>'
    raw = b"\nexif\n      %d\n" % len(exif) + exif.hex().encode()
    places = [
        chunk(b"eXIf", exif),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(packet)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        chunk(b"tEXt", b"Raw profile type exif\0" + raw),
    ]
    for extra in places:
        assert np.array_equal(pixels_of(plain(extra)), turned)
        assert np.array_equal(pixels_of(plain(after=extra)), turned)


# -- GIF ---------------------------------------------------------------------------------------------------------


def gif(canvas: tuple[int, int], frame: tuple[int, int, int, int], key: int | None = None) -> bytes:
    """A GIF whose first picture, all of palette entry 1, covers (left, top, width, height) of its canvas."""
    width, height = frame[2:]
    inner = Image.new("P", (width, height), 1)
    inner.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    data = encode(inner, "GIF", optimize=False)
    start = data.index(b",", 13 + (3 << (data[10] & 7) + 1))
    control = b"" if key is None else b"!\xf9\x04\x01\0\0" + bytes([key]) + b"\0"
    place = struct.pack("<4H", *frame)
    return (
        data[:6]
        + struct.pack("<2H", *canvas)
        + data[10 : 13 + (3 << (data[10] & 7) + 1)]
        + control
        + (b"," + place + data[start + 9 :])
    )


@pytest.mark.parametrize("key", [None, 0, 7])
def test_around_the_first_picture_a_canvas_is_transparent(key):
    expected = np.tile(MATTE, (SIDE, SIDE, 1))
    expected[3:9, 2:12] = (0, 0, 255)
    assert np.array_equal(pixels_of(gif((SIDE, SIDE), (2, 3, 10, 6), key), matte=MATTE), expected)


def test_a_picture_that_covers_its_canvas_stays_opaque_unless_it_says_otherwise():
    assert (pixels_of(gif((SIDE, SIDE), (0, 0, SIDE, SIDE)), matte=MATTE) == (0, 0, 255)).all()
    assert (pixels_of(gif((SIDE, SIDE), (0, 0, SIDE, SIDE), 1), matte=MATTE) == MATTE).all()


# -- BMP ---------------------------------------------------------------------------------------------------------


def bitmap(alpha: np.ndarray) -> bytes:
    """A bitmap of version 4 with an alpha mask."""
    blue = np.ascontiguousarray(np.dstack([PICTURE[:SIDE, :SIDE, ::-1], alpha])[::-1])
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = (
        struct.pack("<IiiHHIIiiII", 108, SIDE, SIDE, 1, 32, 3, blue.size, 0, 0, 0, 0) + masks + b"BGRs" + bytes(48)
    )
    return b"BM" + struct.pack("<IHHI", 14 + 108 + blue.size, 0, 0, 14 + 108) + header + blue.tobytes()


def test_an_alpha_channel_that_is_all_zero_is_none():
    zero = np.zeros((SIDE, SIDE), np.uint8)
    assert np.array_equal(pixels_of(bitmap(zero), matte=MATTE), PICTURE[:SIDE, :SIDE])
    some = zero.copy()
    some[0, 0] = 255
    expected = np.tile(MATTE, (SIDE, SIDE, 1))
    expected[0, 0] = PICTURE[0, 0]
    assert np.array_equal(pixels_of(bitmap(some), matte=MATTE), expected)


# -- JPEG --------------------------------------------------------------------------------------------------------

JPEGS = [
    {"progressive": progressive, "subsampling": subsampling, "quality": 90, **restarts}
    for progressive, subsampling, restarts in itertools.product(
        (False, True), (0, 2), ({}, {"restart_marker_blocks": 3}, {"optimize": True})
    )
]


@pytest.mark.parametrize("options", JPEGS)
def test_a_jpeg_that_lacks_only_its_end_is_whole(options):
    for mode in ("RGB", "L", "CMYK"):
        data = encode(Image.fromarray(gradient(120, 200)).convert(mode), "JPEG", **options)
        assert data.endswith(b"\xff\xd9")
        for draft in (False, True):
            expected = pixels_of(data, draft=draft)
            for without in (data[:-2], data[:-1], data[:-2] + bytes(300)):
                assert np.array_equal(pixels_of(without, draft=draft), expected)


@pytest.mark.parametrize("options", JPEGS)
def test_a_jpeg_that_lacks_more_is_truncated(options):
    noise = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    data = encode(noise, "JPEG", **options)
    for cut in (6, 12, 40, 200, len(data) // 3, len(data) // 2):
        assert reason_of(data[:-cut]) in ("truncated", "corrupt"), cut
    scan = data.rindex(b"\xff\xda")
    if options["progressive"]:
        assert reason_of(data[:scan]) == "truncated", "the last scan is missing as a whole"


def test_codings_of_jpeg_that_are_not_read_are_named():
    wide = np.random.default_rng(1).integers(0, 4096, (SIDE, SIDE, 3), dtype=np.uint16)
    assert reason_of(imagecodecs.jpeg_encode(wide, bitspersample=12)) == "unsupported_coding"
    lossless = imagecodecs.ljpeg_encode(wide[..., 0], bitspersample=12)
    assert reason_of(lossless) == "unsupported_coding"


# -- HEIC and JPEG XL --------------------------------------------------------------------------------------------


def heic(picture: np.ndarray, **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    pillow_heif.register_heif_opener()
    return encode(picture, "HEIF", quality=-1, chroma=444, matrix_coefficients=0, **options)


def test_heic_gives_its_pixels_upright_once():
    data = heic(PICTURE)
    assert sniff(data) == "heic"
    exact = {"buckets": {"kind": "table", "sizes": ((40, 60),)}, "multiple_of": 1}
    assert np.array_equal(pixels_of(data, **exact), PICTURE)
    exif = Image.Exif()
    exif[0x0112] = 6  # written as irot, and kept in the EXIF beside it
    stored = np.asarray(Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_90))
    turned = heic(stored, exif=exif.tobytes())
    assert b"irot" in turned
    result = outcome(turned, **exact)
    assert result[0].original == (40, 60)
    assert np.array_equal(result[0].pixels, PICTURE)
    untold = heic(PICTURE, exif=exif)  # EXIF alone turns nothing: HEIC has an orientation of its own
    assert b"irot" not in untold
    assert np.array_equal(pixels_of(untold, **exact), PICTURE)


def test_jpeg_xl_gives_its_pixels_upright_once():
    pytest.importorskip("pillow_jxl", reason="needs the extra jxl")
    exact = {"buckets": {"kind": "table", "sizes": ((40, 60),)}, "multiple_of": 1}
    for container in (False, True):
        data = encode(PICTURE, "JXL", lossless=True, use_container=container)
        assert sniff(data) == "jxl"
        assert np.array_equal(pixels_of(data, **exact), PICTURE)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(PICTURE).transpose(Image.Transpose.ROTATE_90)
    # Packed JPEGs carry the turn in their codestream and in their EXIF; both mean the same one.
    packed = imagecodecs.jpegxl_encode_jpeg(encode(stored, "JPEG", quality=98, subsampling=0, exif=exif))
    result = outcome(packed, **exact)
    assert result[0].original == (40, 60)
    assert np.abs(result[0].pixels.astype(int) - PICTURE).max() <= 6
    # EXIF alone turns nothing: JPEG XL has an orientation of its own.
    untold = encode(PICTURE, "JXL", lossless=True, exif=exif.tobytes())
    assert np.array_equal(pixels_of(untold, **exact), PICTURE)


@pytest.mark.parametrize(("kind", "module"), [("heic", "pillow_heif"), ("jxl", "pillow_jxl")])
def test_without_the_extra_the_reject_names_it(monkeypatch, kind, module):
    data = {"heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "jxl": b"\xff\x0a" + bytes(40)}[kind]
    monkeypatch.setitem(sys.modules, module, None)
    result = outcome(data, isolate="never")
    assert (result.reason, f"latentloom[{kind}]" in result.message) == ("unsupported_format", True)


@pytest.mark.parametrize("kind", ["heic", "jxl"])
def test_damaged_files_of_the_extras_are_rejects(kind):
    pytest.importorskip({"heic": "pillow_heif", "jxl": "pillow_jxl"}[kind], reason=f"needs the extra {kind}")
    data = heic(PICTURE) if kind == "heic" else encode(PICTURE, "JXL")
    for share in (0.2, 0.6, 0.95):
        assert reason_of(data[: int(len(data) * share)]) in ("corrupt", "truncated", "unsupported_coding")
    assert reason_of(data, max_pixels=40 * 60 - 1) == "too_many_pixels"


def test_the_decoders_are_facts_of_the_fingerprint():
    policy = policy_fingerprint(ImageConfig())
    assert policy["policy_version"] == POLICY_VERSION == 2
    assert {"tifffile", "imagecodecs", "pillow_heif", "pillow_jxl"} <= set(policy["libraries"])
    assert policy["libraries"]["imagecodecs"] == imagecodecs.__version__


def test_every_format_says_its_name():
    assert sniff(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == "heic"
    assert sniff(b"\0\0\0\x18ftypmif1\0\0\0\0avifheic") == "avif"
