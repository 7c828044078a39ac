"""A JPEG that lacks only its end marker, told from one whose data end too early.

libjpeg says the same of both. But entropy-coded data that are complete decode to the same picture whatever bytes
follow them, and of data that are not the missing part does follow those bytes.
"""

from __future__ import annotations

import io

from PIL import Image, JpegImagePlugin

from pipeline.source.pixels.strip import JPEG_FRAMES, jpeg_segments

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
