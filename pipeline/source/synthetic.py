"""The quickstart's data: small pictures of coloured shapes, written as an image folder with metadata.jsonl.

Twelve classes (circle, square, triangle, cross in red, green, blue), each picture drawn from (seed, index) alone:
place, size, shade and background are random, the label is index modulo 12. The same call always writes the same
bytes, so an interrupted one is simply repeated; a finished one is recognised by its marker and skipped.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.errors import ConflictError
from pipeline.storage.root import Root
from pipeline.storage.stored import OBJECT, read_stored

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue")
CLASS_NAMES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
_RGB = {"red": (215, 45, 40), "green": (45, 180, 60), "blue": (45, 85, 215)}
_VERSION = 1
_SUPERSAMPLING = 4
_MARKER = ".shapes.json"  # hidden, so that it is no row of the folder
_METADATA = "metadata.jsonl"
_UPLOADS = 16


@dataclass(frozen=True)
class ShapesReport:
    """What one call did."""

    images: int
    written: int
    skipped: bool


def write_shapes(
    uri: str,
    *,
    count: int = 4096,
    seed: int = 0,
    size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> ShapesReport:
    """Write `count` pictures of `size` x `size` pixels and their metadata below `uri`, unless they are there.

    ConflictError when the place holds shapes of other parameters; `progress` gets the number of pictures done.
    """
    root = Root(uri)
    marker = {"version": _VERSION, "count": count, "seed": seed, "size": size}
    try:
        present = read_stored(OBJECT, root, _MARKER)
    except FileNotFoundError:
        present = None
    if present is not None and present != marker:
        raise ConflictError(
            f"{root.uri} holds shapes made with {present}",
            key="uri",
            value=uri,
            rule=f"asked for {marker}",
            next_step="choose another place, or the same parameters",
        )
    if present is not None:
        return ShapesReport(count, 0, skipped=True)
    lines = [
        json.dumps(
            {"file_name": _name(i), "label": i % len(CLASS_NAMES), "text": f"a {CLASS_NAMES[i % len(CLASS_NAMES)]}"}
        )
        for i in range(count)
    ]

    def write(index: int) -> int:
        sink = io.BytesIO()
        Image.fromarray(draw_shape(seed, index, size)).save(sink, "PNG")
        _put(root, _name(index), sink.getvalue())
        return index

    with ThreadPoolExecutor(_UPLOADS) as pool:
        # Only uploads wait for anything that others could use meanwhile.
        for index in (pool.map if root.local_path() is None else map)(write, range(count)):
            if progress is not None:
                progress(index + 1)
    _put(root, _METADATA, ("\n".join(lines) + "\n").encode())
    root.put(_MARKER, json.dumps(marker).encode())
    return ShapesReport(count, count, skipped=False)


def draw_shape(seed: int, index: int, size: int) -> np.ndarray:
    """Picture `index` of a seed, uint8 [size, size, 3]; its label is index modulo 12."""
    label = index % len(CLASS_NAMES)
    color, shape = COLORS[label % len(COLORS)], SHAPES[label // len(COLORS)]
    key = hashlib.blake2b(f"shapes {seed} {index}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
    grey = rng.uniform(25, 230)
    background = tuple(int(c) for c in np.clip(grey + rng.uniform(-14, 14, 3), 0, 255))
    shade = tuple(int(c) for c in np.clip(np.array(_RGB[color]) + rng.uniform(-25, 25, 3), 0, 255))
    side = size * _SUPERSAMPLING
    radius = rng.uniform(0.26, 0.42) * side
    x, y = rng.uniform(radius, side - radius, 2)
    canvas = Image.new("RGB", (side, side), background)
    pen, r = ImageDraw.Draw(canvas), radius
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=shade)
    elif shape == "square":
        half = 0.82 * r
        pen.rectangle((x - half, y - half, x + half, y + half), fill=shade)
    elif shape == "triangle":
        corners = [(x + r * math.sin(a), y - r * math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
        pen.polygon(corners, fill=shade)
    else:
        arm = 0.30 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=shade)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=shade)
    return np.array(canvas.resize((size, size), Image.Resampling.BOX))


def _put(root: Root, key: str, data: bytes) -> None:
    path = root.local_path(key)
    if path is None:
        root.put(key, data)
        return
    # Plain writes: the marker, written durably at the end, is what says that these are whole.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _name(index: int) -> str:
    return f"images/{index // 1000:03d}/{index:06d}.png"
