"""Small images of every kind, made on the spot, for the tests of pipeline/source."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.source.config import ImageConfig
from pipeline.source.pixels.prepare import PreparedImage, Reject, prepare
from pipeline.source.reading.rows import SourceRow

# Nothing is filtered, so that a test sees what it asks about.
OPEN = {"resolution": 16, "max_upscale": 1e6, "max_aspect": 1e6}


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth uint8 [h, w, 3] picture without symmetries."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 20 + 200 * x / max(1, width - 1), 30 + 180 * y / max(1, height - 1)
    blue = 128 + 90 * np.sin(x / 9 + y / 5)
    return np.stack([red, green, blue], axis=-1).round().astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """The picture as a file of a Pillow format."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def row(data: bytes | None, key: str = "a.jpg", **fields: Any) -> SourceRow:
    """A source row around bytes."""
    return SourceRow(0, key, data, **fields)


def outcome(data: bytes, **config: Any) -> list[PreparedImage] | Reject:
    """`prepare` with nothing filtered."""
    return prepare(row(data), ImageConfig(**{**OPEN, **config}))


def pixels_of(data: bytes, **config: Any) -> np.ndarray:
    """The only variant's pixels as int [h, w, 3]."""
    result = outcome(data, **config)
    assert isinstance(result, list), result
    assert len(result) == 1
    return result[0].pixels.astype(int)


def reason_of(data: bytes, **config: Any) -> str:
    """The reason why these bytes give nothing."""
    result = outcome(data, **config)
    assert isinstance(result, Reject), "the image was decoded"
    return result.reason.value


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB."""
    return float(10 * np.log10(255**2 / max(1e-10, np.mean((a.astype(float) - b.astype(float)) ** 2))))


def write(path: Path, data: bytes | str) -> Path:
    """A file with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path
