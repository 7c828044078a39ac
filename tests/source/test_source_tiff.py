"""TIFF of every layout: the picture follows from the samples by the rules of DECODE.md, however they are stored."""

from __future__ import annotations

import io
import struct
from itertools import product

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from source_images import encode, gradient, outcome, pixels_of, reason_of

HEIGHT, WIDTH = 40, 61  # no multiple of a tile, a strip or a byte
EXACT = {"buckets": {"kind": "table", "sizes": ((HEIGHT, WIDTH),)}, "multiple_of": 1}
PICTURE = gradient(HEIGHT, WIDTH)
GREY = PICTURE[..., 0]
IN_THREAD = {"isolate": "never"}  # quicker, and the same pixels


def write(samples: np.ndarray, **options: object) -> bytes:
    """A TIFF of these samples without any metadata."""
    sink = io.BytesIO()
    options = {"photometric": "minisblack", "metadata": None, "rowsperstrip": 16, **options}
    if "tile" in options:
        del options["rowsperstrip"]
    tifffile.imwrite(sink, samples, **options)
    return sink.getvalue()


def handmade(
    strip: bytes, bits: int, order: str = "<", *, photometric: int, planes: int = 1, table: object = ()
) -> bytes:
    """A TIFF of one uncompressed band, for what tifffile does not write: small palettes, one band in a plane."""
    short = f"{order}u2"
    colours = np.asarray(table, short).tobytes()
    entries = [
        (256, WIDTH),
        (257, HEIGHT),
        (258, bits),
        (259, 1),
        (262, photometric),
        (277, 1),
        (278, HEIGHT),
        (284, planes),
    ]
    longs = [(273, 1, 8 + len(colours)), (279, 1, len(strip))]
    if colours:
        longs.append((320, len(colours) // 2, 8))
    lines = [
        np.array([tag, 3, *([1, 0] if order == "<" else [0, 1]), value, 0], short).tobytes() for tag, value in entries
    ]
    for tag, count, value in longs:
        kind = 3 if tag == 320 else 4
        lines.append(np.array([tag, kind], short).tobytes() + np.array([count, value], f"{order}u4").tobytes())
    lines.sort(key=lambda line: int(np.frombuffer(line[:2], short)[0]))
    magic = (b"II*\0" if order == "<" else b"MM\0*") + np.array(
        [8 + len(colours) + len(strip)], f"{order}u4"
    ).tobytes()
    return magic + colours + strip + np.array([len(lines)], short).tobytes() + b"".join(lines) + bytes(4)


def decoded(data: bytes) -> np.ndarray:
    return pixels_of(data, **EXACT, **IN_THREAD)


def same(data: bytes, expected: np.ndarray, tolerance: int = 0) -> None:
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert np.abs(decoded(data) - expected.astype(int)).max() <= tolerance


def wide(samples: np.ndarray, kind: str) -> np.ndarray:
    """8-bit samples in another type, with lower bits that say nothing."""
    if kind.startswith("f"):
        return (samples / 255).astype(kind)
    shift = 8 * (np.dtype(kind).itemsize - 1)
    noise = np.random.default_rng(1).integers(0, 1 << shift, samples.shape, dtype=np.uint64)
    return ((samples.astype(np.uint64) << shift) | noise).astype(kind)


CODINGS = (None, "lzw", "deflate", "packbits", "zstd", "lzma")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "u8", "f2", "f4", "f8"])
def test_every_type_order_coding_and_layout(kind, order):
    for coding, planar, tile in product(CODINGS, ("contig", "separate"), (None, (16, 32))):
        layout = {"tile": tile} if tile else {}
        options = {"compression": coding, "byteorder": order, **layout}
        same(write(wide(GREY, kind), **options), GREY)
        samples = wide(PICTURE, kind)
        stored = samples if planar == "contig" else np.moveaxis(samples, 2, 0).copy()
        same(write(stored, photometric="rgb", planarconfig=planar, **options), PICTURE)


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "f4"])
def test_predictors(kind):
    for coding in ("lzw", "deflate", "zstd"):
        for samples, photometric in ((GREY, "minisblack"), (PICTURE, "rgb")):
            data = write(wide(samples, kind), photometric=photometric, compression=coding, predictor=True)
            same(data, samples)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14])
def test_every_depth_spans_the_whole_range_and_inverts(bits):
    top = (1 << bits) - 1
    stored = (
        np.random.default_rng(2).integers(0, top + 1, (HEIGHT, WIDTH)).astype(np.uint8 if bits <= 8 else np.uint16)
    )
    expected = stored >> (bits - 8) if bits > 8 else np.rint(stored * (255 / top)).astype(int)
    options = {"bitspersample": bits} if bits > 1 else {}
    for photometric, picture in (("minisblack", expected), ("miniswhite", 255 - expected)):
        same(write(stored if bits > 1 else stored.astype(bool), photometric=photometric, **options), picture)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
def test_white_is_zero_in_every_order_and_coding(kind, order):
    for coding in CODINGS:
        data = write(wide(GREY, kind), photometric="miniswhite", compression=coding, byteorder=order)
        same(data, 255 - GREY)
    samples = wide(GREY, kind).astype(f"{order}{kind}")  # one band in a plane of its own is the same thing
    same(handmade(samples.tobytes(), 8 * samples.itemsize, order, photometric=0, planes=2), 255 - GREY)


@pytest.mark.parametrize("kind", ["u1", "u2", "u4"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_alpha_and_bands_without_meaning(kind, planar):
    alpha = np.full((HEIGHT, WIDTH, 1), 128, np.uint8)
    shown = np.rint(PICTURE * (128 / 255) + 255 * (127 / 255))
    multiplied = np.rint(PICTURE * (128 / 255)).astype(np.uint8)

    def stored(*bands: np.ndarray) -> np.ndarray:
        samples = wide(np.concatenate(bands, axis=2), kind)
        return samples if planar == "contig" else np.moveaxis(samples, 2, 0).copy()

    options = {"photometric": "rgb", "planarconfig": planar}
    same(write(stored(PICTURE, alpha), extrasamples=["unassalpha"], **options), shown, 1)
    same(write(stored(multiplied, alpha), extrasamples=["assocalpha"], **options), shown, 2)
    same(write(stored(PICTURE, alpha), extrasamples=["unspecified"], **options), PICTURE)
    many = stored(PICTURE, alpha, alpha, alpha)
    same(write(many, extrasamples=["unspecified"] * 3, **options), PICTURE)
    same(write(many, extrasamples=["unspecified", "unassalpha", "unspecified"], **options), shown, 1)
    grey = {**options, "photometric": "minisblack"}
    same(write(stored(PICTURE[..., :1], alpha), extrasamples=["unassalpha"], **grey), shown[..., 0], 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_palettes_of_every_depth(bits):
    rng = np.random.default_rng(3)
    table = rng.integers(0, 256, (3, 1 << bits)).astype(np.uint16) * 257
    stored = rng.integers(0, 1 << bits, (HEIGHT, WIDTH)).astype(np.uint16 if bits > 8 else np.uint8)
    expected = (table >> 8).T[stored]
    places = np.unpackbits(stored.astype(">u2").view(np.uint8).reshape(HEIGHT, WIDTH, 2), axis=2)[..., 16 - bits :]
    strip = (
        stored.astype("<u2").tobytes() if bits == 16 else np.packbits(places.reshape(HEIGHT, -1), axis=1).tobytes()
    )
    same(handmade(strip, bits, photometric=3, table=table), expected)
    same(handmade(strip, bits, photometric=3, table=table >> 8), expected)  # as old writers fill it


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_cmyk_in_one_plane_and_in_four(kind):
    inks = np.asarray(Image.fromarray(PICTURE).convert("CMYK"))
    for planar in ("contig", "separate"):
        stored = wide(inks, kind) if planar == "contig" else np.moveaxis(wide(inks, kind), 2, 0).copy()
        same(write(stored, photometric="separated", planarconfig=planar), PICTURE, 1)


def test_lab_of_both_signs_and_depths():
    whole = encode(Image.fromarray(PICTURE).convert("RGB"), "PNG")
    assert np.array_equal(pixels_of(whole, **EXACT), PICTURE)
    lab = np.full((HEIGHT, WIDTH, 3), (200, 10, 246), np.uint8)  # L 78, a 10, b -10
    first = decoded(write(lab, photometric="cielab"))
    assert np.array_equal(decoded(write(lab ^ np.array([0, 128, 128], np.uint8), photometric="icclab")), first)
    assert np.array_equal(decoded(write(wide(lab, "u2"), photometric="cielab")), first)
    assert np.ptp(first.reshape(-1, 3), axis=0).max() == 0
    assert np.abs(first[0, 0] - (206, 188, 213)).max() <= 1  # by the formulas of CIELab and sRGB, D50


@pytest.mark.parametrize("coding", ["jpeg", "group3", "group4", "tiff_ccitt", "tiff_lzw", "zstd"])
def test_codings_that_pillow_writes(coding):
    fax = coding in ("group3", "group4", "tiff_ccitt")
    image = Image.fromarray(PICTURE).convert("1") if fax else Image.fromarray(PICTURE)
    options = {"quality": 98} if coding == "jpeg" else {}
    data = encode(image, "TIFF", compression=coding, **options)
    same(data, np.asarray(image.convert("RGB")), 40 if coding == "jpeg" else 0)


def test_jpeg_within_tiff_is_what_pillow_makes_of_it():
    for kind in ("RGB", "L", "YCbCr"):
        data = encode(Image.fromarray(PICTURE).convert(kind), "TIFF", compression="jpeg", quality=95)
        same(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_orientation_of_every_depth(kind, orientation):
    data = write(wide(GREY, kind), extratags=[(274, 3, 1, orientation, True)])
    turned = np.asarray(_turned(Image.fromarray(GREY), orientation))
    result = outcome(data, buckets={"kind": "table", "sizes": (turned.shape,)}, multiple_of=1)
    assert result[0].original == turned.shape
    assert np.array_equal(result[0].pixels[..., 0], turned)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return ImageOps.exif_transpose(Image.open(io.BytesIO(encode(image, "PNG", exif=exif))))


def test_big_files_and_rarer_codings():
    same(write(PICTURE, photometric="rgb", compression="webp"), PICTURE)
    same(write(PICTURE, photometric="rgb", compression="lerc"), PICTURE)
    same(write(PICTURE, photometric="rgb", bigtiff=True), PICTURE)
    same(write(PICTURE, photometric="rgb", bigtiff=True, byteorder=">", compression="lzw"), PICTURE)


def test_what_has_no_agreed_picture_is_refused():
    signed = GREY.astype(np.int16)
    assert reason_of(write(signed), **IN_THREAD) == "unsupported_coding"
    assert reason_of(write(GREY.astype(np.complex64)), **IN_THREAD) == "unsupported_coding"
    alpha = np.dstack([PICTURE, GREY, GREY])
    inks = write(alpha, photometric="separated", extrasamples=["unassalpha"])
    assert reason_of(inks, **IN_THREAD) == "unsupported_coding"
    assert reason_of(write(GREY.astype(np.float32), photometric="miniswhite"), **IN_THREAD) == "unsupported_coding"
    assert reason_of(write(GREY, photometric="mask"), **IN_THREAD) == "unsupported_coding"
    assert reason_of(write(GREY, compression="jpegxl"), **IN_THREAD) == "unsupported_coding"
    assert reason_of(write(wide(GREY, "f4") * 300), **IN_THREAD) == "value_range"


@pytest.mark.parametrize("number", [256, 257, 258, 259, 262, 277])
def test_tags_of_too_many_values_are_damage(number):
    data = bytearray(handmade(GREY.tobytes(), 8, photometric=1))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tag = file.pages.first.tags[number]
    data[tag.offset + 4 : tag.offset + 12] = struct.pack("<II", 1000, 8)  # a thousand numbers, and where they lie
    result = outcome(bytes(data), **IN_THREAD)
    assert result.reason in ("corrupt", "unsupported_coding")
    assert len(result.message) < 300


@pytest.mark.parametrize("coding", CODINGS)
def test_missing_strips_and_tiles_are_no_grey(coding):
    for options in ({}, {"tile": (16, 32)}):
        data = write(np.random.default_rng(4).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8), **options)
        assert reason_of(data[:-300], **IN_THREAD) in ("truncated", "corrupt")
        data = write(GREY, compression=coding, **options)
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            tag = page.tags[325 if "tile" in options else 279]
            last = tag.valueoffset + (tag.count - 1) * (2 if tag.dtype == 3 else 4)
        holed = data[:last] + bytes(2 if tag.dtype == 3 else 4) + data[last + (2 if tag.dtype == 3 else 4) :]
        if coding is not None or options:
            assert reason_of(holed, **IN_THREAD) in ("truncated", "corrupt")
