"""Every real file beside a second decoder with libraries and code of its own: where they differ is written down.

The second one is imagecodecs (libtiff's own picture of a TIFF, libpng, libjpeg-turbo, libwebp, OpenJPEG) or OpenCV.
Compared are the first pictures as they are stored, before profile and orientation, over white.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
from PIL import Image

from pipeline.source.config import FORMATS
from pipeline.source.pixels.decode import DecodeLimits, load_image, open_image, sniff
from pipeline.source.pixels.samples import simplify, to_srgb
from pipeline.source.reasons import DecodeError

pytestmark = pytest.mark.integration

# (in which way, why): the same list is in DECODE.md.
DIFFERENCES = {
    "bmp_32_v4_alpha0.bmp": ("pixels", "OpenCV keeps an alpha channel that nobody set"),
    "gif_partial_first_no_transparency.gif": ("pixels", "OpenCV paints the canvas around the picture"),
    "tiff_uint32.tif": ("only ours", "libtiff's RGBA interface reads up to 16 bits"),
    "hopper_unknown_pixel_mode.tif": ("only ours", "as above: 32 bits"),
    "tiff_strip_cmyk_16l_jpeg.tif": ("only ours", "libtiff's RGBA interface reads CMYK of 8 bits"),
    "8bit.s.tif": ("only theirs", "signed samples are refused here, libtiff reads them as unsigned"),
    "lab-red.tif": ("pixels", "Lab to sRGB by another white point"),
    "g4_orientation_7.tif": ("size", "fax codings are turned while they are loaded"),
    "crash-74d2a78403a5a59db1fb0a2b8735ac068a75f6e3.tif": ("size", "as above"),
    "crash-2020-10-test.tif": ("only theirs", "damaged: libtiff's RGBA interface leaves the damage grey"),
    "crash-63b1dffefc8c075ddc606c0a2f5fdc15ece78863.tif": ("only theirs", "as above"),
    "bmp__g__rgb16-565pal.bmp": ("pixels", "OpenCV shifts 5 and 6 bits instead of scaling them"),
    "bmp__g__pal8os2.bmp": ("pixels", "OpenCV makes grey of OS/2 palettes"),
    "bmp__q__pal8os2sp.bmp": ("pixels", "as above"),
    "rgb32bf-abgr.bmp": ("pixels", "OpenCV keeps an alpha channel that nobody set"),
    "hopper_rle8_row_overflow.bmp": ("only ours", "OpenCV refuses runs beyond a row"),
    "no_palette_with_background.gif": ("only ours", "OpenCV refuses a GIF without palettes"),
}


def opencv(data: bytes) -> np.ndarray:
    """Samples in RGB order by OpenCV, whose decoders of GIF and BMP are its own."""
    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return samples[..., [2, 1, 0, 3][: samples.shape[-1]]] if samples.ndim == 3 else samples


LIMITS = DecodeLimits(FORMATS, 100_000_000, 1e9)
TOLERANCE = 3  # steps: alpha is divided out at 8 bits, and chroma rounded in different places
DECODERS = {
    "tiff": lambda data: imagecodecs.tiff_decode(data, asrgb=True),
    "png": imagecodecs.png_decode,
    "jpeg": imagecodecs.jpeg8_decode,
    "gif": lambda data: opencv(data),
    "webp": imagecodecs.webp_decode,
    "bmp": lambda data: opencv(data),
    "avif": lambda data: opencv(data),
    "jpeg2000": imagecodecs.jpeg2k_decode,
}


def ours(data: bytes) -> np.ndarray | None:
    """RGB as stored over white, or None."""
    try:
        opened = open_image(data, LIMITS)
        return np.asarray(to_srgb(load_image(opened, LIMITS), None, (255, 255, 255))).astype(int)
    except DecodeError:
        return None


def theirs(data: bytes, kind: str) -> np.ndarray | None:
    """The same by the second decoder."""
    try:
        samples = DECODERS[kind](data)
    except Exception:
        return None
    samples = samples * np.uint8(255) if samples.dtype == bool else samples
    samples = (samples >> 8).astype(np.uint8) if samples.dtype == np.uint16 else samples
    samples = samples if samples.ndim == 3 else samples[..., None]
    if samples.dtype != np.uint8 or samples.shape[-1] > 4:
        return None
    mode = ["L", "LA", "RGB", "RGBa" if kind == "tiff" else "RGBA"][samples.shape[-1] - 1]
    picture = simplify(Image.frombytes(mode, samples.shape[1::-1], np.ascontiguousarray(samples).tobytes()))
    return np.asarray(to_srgb(picture, None, (255, 255, 255))).astype(int)


def verdict(data: bytes, kind: str) -> str:
    """ "agree", or in which way not."""
    one, other = ours(data), theirs(data, kind)
    if one is None or other is None:
        return "agree" if one is other else "only ours" if other is None else "only theirs"
    if one.shape != other.shape:
        return "size"
    return "agree" if np.abs(one - other).max() <= TOLERANCE else "pixels"


@pytest.mark.parametrize("folder", ["tricky", "photos", "cases/images"])
def test_two_decoders_agree_but_for_what_is_written_down(shared_data: Path, folder: str):
    if not (shared_data / folder).is_dir():
        pytest.skip(f"no {folder} among the test data")
    differing, compared = {}, 0
    for path in sorted((shared_data / folder).iterdir()):
        data = path.read_bytes()
        kind = sniff(data)
        if kind in DECODERS:
            compared += 1
            differing[path.name] = verdict(data, kind)
    expected = {name: how for name, (how, _) in DIFFERENCES.items() if name in differing}
    assert {name: how for name, how in differing.items() if how != "agree"} == expected
    assert compared >= 9
