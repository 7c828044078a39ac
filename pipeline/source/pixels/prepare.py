"""A source row becomes rows of pixels, or one reject: the last step before the device.

SourceRow --render (here or in a child)--> one output per resolution --flip--> list[PreparedImage]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from PIL import features

from pipeline.source.config import BudgetBuckets, ImageConfig
from pipeline.source.pixels.decode import EXTRAS, is_risky, sniff
from pipeline.source.pixels.render import DRAFT_MARGIN, Size, bucket_sizes, render
from pipeline.source.pixels.sandbox import render_isolated
from pipeline.source.reading.rows import SourceRow, sample_id
from pipeline.source.reasons import DecodeError, Reason

# Raised by hand whenever a change of the decode policy changes pixels; part of every dataset's fingerprint.
POLICY_VERSION = 2


@dataclass(frozen=True)
class PreparedImage:
    """One row for the codec: pixels uint8 [h, w, 3] sRGB and where they come from.

    original: (height, width) after EXIF orientation; crop: (top, left, height, width) in those pixels, before
    any flip; sample_id: 16 bytes; content_sha256: 32 bytes, of the stored file; phash: 64 bits or None.
    """

    pixels: np.ndarray
    bucket: Size
    variant: int
    flipped: bool
    original: Size
    crop: tuple[int, int, int, int]
    sample_id: bytes
    content_sha256: bytes
    phash: int | None


@dataclass(frozen=True)
class Reject:
    """A row without pixels: status "rejected" or "filtered", a reason of the closed list, and the particulars."""

    status: str
    reason: Reason
    message: str

    @staticmethod
    def of(reason: Reason, message: str) -> Reject:
        """A reject whose status follows from its reason."""
        return Reject(reason.status, reason, message)


def prepare(row: SourceRow, image: ImageConfig) -> list[PreparedImage] | Reject:
    """Every variant of a row, or why there is none; never raises for any bytes.

    Variant numbers are fixed by the configuration: resolution index, times two with flips (the odd ones flipped);
    a resolution that is filtered by the upscale limit leaves its numbers out.
    """
    if row.reason is not None:
        return Reject.of(Reason(row.reason), row.message or "")
    if row.image is None:
        return Reject.of(Reason.NO_IMAGE, "the row holds no image")
    identity = sample_id(row.source, row.key)
    kind = sniff(row.image)
    risky = image.isolate == "risky" and kind in image.formats and kind is not None and is_risky(row.image, kind)
    draw = render_isolated if risky or image.isolate == "all" else render
    try:
        rendering = draw(row.image, identity, row.exif_orientation, image)
    except DecodeError as error:
        return Reject.of(error.reason, error.message)
    digest = hashlib.sha256(row.image).digest()
    out = []
    for flipped in (False, True) if image.flip else (False,):
        for output in rendering.outputs:
            at = output.placement
            variant = output.resolution_index * (2 if image.flip else 1) + flipped
            out.append(
                PreparedImage(
                    pixels=np.ascontiguousarray(output.pixels[:, ::-1]) if flipped else output.pixels,
                    bucket=at.bucket,
                    variant=variant,
                    flipped=flipped,
                    original=output.original,
                    crop=(at.top, at.left, at.height, at.width),
                    sample_id=sample_id(row.source, row.key, variant),
                    content_sha256=digest,
                    phash=rendering.phash,
                )
            )
    return out


_THUMBNAIL = 96  # pixels of a side, by area
# Left out for what the configuration wants: the bytes themselves may well be a picture.
_SOUND = frozenset((Reason.TOO_SMALL, Reason.UPSCALE_LIMIT, Reason.EXTREME_ASPECT))


def thumbnail_of(row: SourceRow, image: ImageConfig, reason: Reason) -> np.ndarray | None:
    """A small picture, uint8 [h, w, 3], of a row that was left out for its shape; None where there is nothing to see.

    Decoded in a killable child whatever `image.isolate` says, under the same limits of bytes, pixels and seconds.
    """
    if row.image is None or reason not in _SOUND:
        return None
    shape = {"resolution": _THUMBNAIL, "buckets": BudgetBuckets(kind="budget", step=8, max_aspect=4.0)}
    wide = {"multiple_of": 1, "min_side": 1, "max_upscale": 1e6, "max_aspect": 1e6, "crop": "center", "phash": False}
    try:
        drawn = render_isolated(
            row.image, bytes(16), row.exif_orientation, image.model_copy(update={**shape, **wide})
        )
    except DecodeError:
        return None
    return drawn.outputs[0].pixels


def policy_fingerprint(image: ImageConfig) -> dict[str, Any]:
    """Everything in preprocessing that changes pixels or which crop they are of; limits and filters are not in it.

    Limits decide only whether a row exists, so raising one and retrying its rejects extends a dataset.
    Versions are those of the libraries whose arithmetic reaches the pixels.
    """
    return {
        "policy_version": POLICY_VERSION,
        "resize": "lanczos, reducing_gap 3",
        "draft_margin": DRAFT_MARGIN if image.draft else None,
        "buckets": {str(r): [list(b) for b in bucket_sizes(image, r)] for r in image.resolutions},
        "crop": image.crop,
        "flip": image.flip,
        "matte": list(image.matte),
        "icc": "to sRGB, relative colorimetric, black point compensation",
        "pillow": metadata.version("pillow"),
        "libraries": {
            **{name: features.version(name) for name in ("jpg", "littlecms2", "jpg_2000", "webp", "avif", "libtiff")},
            **{name: _installed(name) for name in ("tifffile", "imagecodecs", *EXTRAS.values())},
        },
    }


def _installed(module: str) -> str | None:
    """The version of the distribution that provides a module, None without it."""
    try:
        return metadata.version({"pillow_jxl": "pillow-jxl-plugin"}.get(module, module))
    except metadata.PackageNotFoundError:
        return None
