"""TIFF: the first page's samples as they are stored, and the few rules that make a picture of them.

    bytes --tifffile--> tags --check--> samples [h, w, bands] of any type --> 8 bits --> L, LA, RGB, RGBA, CMYK or LAB

Pillow knows a fixed list of layouts and reads others wrongly (planes of 16 bits, unsigned 32 bits, inverted grey);
tifffile reads any layout, and imagecodecs unpacks it. What they lack, YCbCr, fax codings and JPEG of the old style,
comes at 8 bits or one, where Pillow and libtiff are right. Runs in a child process: see `is_risky`.
"""

from __future__ import annotations

import io
import logging
import math

import numpy as np
import tifffile
from PIL import Image

from pipeline.source.pixels.samples import floats_to_bytes, integers_to_bytes, simplify
from pipeline.source.pixels.strip import xmp_orientation
from pipeline.source.reasons import DecodeError, Reason

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _CIELAB, _ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _CIELAB: 3, _ICCLAB: 3}
# None, LZW, JPEG, Deflate (two numbers), PackBits, LERC, LZMA, Zstandard, WebP.
_CODINGS = frozenset((1, 5, 7, 8, 32946, 32773, 34887, 34925, 50000, 50001))
_CODINGS_OF_LIBTIFF = frozenset((2, 3, 4, 6))  # fax (three), JPEG of the old style
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4
_ASSOCIATED, _UNASSOCIATED = 1, 2
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it reports odd metadata that are handled here


class Tiff:
    """The first page of a file: its size, profile and orientation by the tags; `load` gives the picture."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._page = page = tifffile.TiffFile(io.BytesIO(data), _multifile=False).pages.first
        assert isinstance(page, tifffile.TiffPage)
        if not isinstance(page.imagewidth, int) or not isinstance(page.imagelength, int):
            raise DecodeError(Reason.CORRUPT, "the TIFF has several widths or heights")
        self.size = (page.imagewidth, page.imagelength)
        profile, packet = self._tag(34675), self._tag(700)
        self.profile = profile if isinstance(profile, bytes) else None
        value = self._tag(274)
        named = xmp_orientation(packet if isinstance(packet, bytes) else None)
        self.orientation = value if isinstance(value, int) and 1 <= value <= 8 else named

    def load(self) -> Image.Image:
        """The picture in one of the six modes; as it is stored, or upright where `orientation` is now 1."""
        page = self._page
        if page.photometric == _YCBCR or page.compression in _CODINGS_OF_LIBTIFF:
            return self._load_with_pillow()
        if page.compression not in _CODINGS:
            raise DecodeError(Reason.UNSUPPORTED_CODING, f"TIFF compression {int(page.compression)}")
        self._check_layout()
        self._check_segments()
        samples = page.asarray(maxworkers=1, squeeze=False)  # [planes, 1, h, w, bands of a plane]
        samples = np.moveaxis(samples[:, 0], 0, 2).reshape(page.imagelength, page.imagewidth, -1)
        return self._picture(samples)

    def _tag(self, number: int) -> object:
        tag = self._page.tags.get(number)
        return None if tag is None else tag.value

    def _load_with_pillow(self) -> Image.Image:
        page = self._page
        chroma = self._tag(530)
        plain = page.compression == 1
        if page.photometric == _YCBCR and (
            page.planarconfig != 1 or page.bitspersample != 8 or (plain and chroma not in (None, (1, 1)))
        ):
            raise DecodeError(
                Reason.UNSUPPORTED_CODING, "YCbCr in planes, of over 8 bits, or subsampled without JPEG"
            )
        image = Image.open(io.BytesIO(self._data), formats=["TIFF"])
        image.load()
        self.orientation = 1 if self.orientation else None  # Pillow turns while it loads
        self.size = image.size
        return simplify(image)

    @property
    def _photometric(self) -> int:
        if 262 in self._page.tags:
            return int(self._page.photometric)
        return _RGB if self._page.samplesperpixel >= 3 else _BLACK_IS_ZERO  # as libtiff guesses

    def _check_layout(self) -> None:
        page = self._page
        photometric, kind = self._photometric, page.sampleformat
        lab = photometric in (_CIELAB, _ICCLAB)
        if photometric not in _COLOURS:
            trouble = f"photometric interpretation {photometric}"
        elif photometric == _CMYK and self._tag(332) not in (None, 1):
            trouble = "inks other than CMYK"
        elif not isinstance(page.bitspersample, int) or page.dtype is None:
            trouble = f"samples of {page.bitspersample} bits, format {kind}"
        elif kind == _SIGNED and not lab:
            trouble = "signed samples, which viewers show in different ways"
        elif kind == _FLOAT and (lab or photometric not in (_BLACK_IS_ZERO, _RGB)):
            trouble = "floats that are neither grey nor RGB"
        elif kind not in (_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED):
            trouble = f"sample format {kind}"
        elif (photometric == _PALETTE and page.bitspersample > 16) or (lab and page.bitspersample not in (8, 16)):
            trouble = f"photometric interpretation {photometric} with {page.bitspersample} bits"
        elif page.imagedepth != 1:
            trouble = "volumes"
        else:
            return
        raise DecodeError(Reason.UNSUPPORTED_CODING, f"TIFF: {trouble}")

    def _check_segments(self) -> None:
        """tifffile fills segments that are not there: every one has to lie in the file."""
        page = self._page
        if page.samplesperpixel < _COLOURS[self._photometric]:
            raise DecodeError(Reason.CORRUPT, f"{page.samplesperpixel} bands are too few for these colours")
        if page.is_contiguous:
            return  # read in one piece, and its length is checked there
        segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
        needed = math.prod(page.chunked)
        if len(segments) < needed or any(
            size < 1 or start + size > len(self._data) for start, size in segments[:needed]
        ):
            raise DecodeError(Reason.TRUNCATED, "strips or tiles are missing or lie beyond the end of the file")

    def _picture(self, samples: np.ndarray) -> Image.Image:
        """Colour bands and alpha as 8 bits; further bands are left out."""
        photometric, bits = self._photometric, int(self._page.bitspersample)
        number = _COLOURS[photometric]
        colour, extra = samples[..., :number], samples[..., number:]
        alpha, associated = self._alpha(extra.shape[-1])
        if photometric == _PALETTE:
            table: np.ndarray | None = self._page.colormap
            if table is None or table.shape != (3, 1 << bits):
                raise DecodeError(Reason.CORRUPT, "a palette image without a palette")
            # Values of 16 bits, or of 8 where all are small, as libtiff has it.
            palette = (table if table.max() < 256 else table >> 8).astype(np.uint8).T
            colour = palette[np.minimum(colour[..., 0], (1 << bits) - 1).astype(np.intp)]
        else:
            colour = _to_bytes(colour, bits)
        if photometric == _WHITE_IS_ZERO:
            colour = 255 - colour
        if photometric == _ICCLAB:
            colour = colour ^ np.array([0, 128, 128], np.uint8)  # to CIELab's signed a and b
        if photometric in (_CMYK, _CIELAB, _ICCLAB):
            if alpha is not None:
                raise DecodeError(Reason.UNSUPPORTED_CODING, "TIFF: CMYK or Lab with alpha")
            return Image.fromarray(np.ascontiguousarray(colour), "CMYK" if photometric == _CMYK else "LAB")
        mode = "L" if colour.shape[-1] == 1 else "RGB"
        if alpha is not None:
            mode = {"L": "La", "RGB": "RGBa"}[mode] if associated else mode + "A"
            colour = np.concatenate([colour, _to_bytes(extra[..., alpha : alpha + 1], bits)], axis=-1)
        # frombytes knows the modes of premultiplied alpha, fromarray does not.
        image = Image.frombytes(mode, (colour.shape[1], colour.shape[0]), np.ascontiguousarray(colour).tobytes())
        return simplify(image)

    def _alpha(self, surplus: int) -> tuple[int | None, bool]:
        """(the alpha band among the surplus ones, whether colours are multiplied by it), or (None, False)."""
        meanings = self._tag(338)
        if meanings is None:
            return (0, False) if surplus == 1 else (None, False)  # a fourth band without a word: Pillow's reading
        meanings = meanings if isinstance(meanings, tuple) else (meanings,)
        for index, meaning in enumerate(meanings[:surplus]):
            if meaning in (_ASSOCIATED, _UNASSOCIATED):
                return index, meaning == _ASSOCIATED
        return None, False


def _to_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    if values.dtype.kind == "f":
        return floats_to_bytes(values)
    if values.dtype.kind == "i":  # of Lab: the upper bits of the two's complement
        values = values.view(f"{values.dtype.byteorder}u{values.dtype.itemsize}")
    return integers_to_bytes(values, bits)
