"""The regenerate job: one image again from its own metadata, compared with the one it came from. No Ray.

On the CPU that the image was drawn on, with the same versions, the bytes are the same. Elsewhere sums are taken in
another order: the pixels are compared, and count as the same up to `TOLERANCE_LEVELS` on average.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.result import JobResult
from pipeline.sample.config import RegenerateJobConfig
from pipeline.sample.provenance import TOLERANCE_LEVELS
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import place_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Difference:
    """How far two images of one size are apart, in levels of 0..255; `psnr_db` is None where they are equal."""

    largest: int
    mean: float
    psnr_db: float | None

    @property
    def tolerable(self) -> bool:
        """Whether the two count as one image drawn on two machines."""
        return self.mean <= TOLERANCE_LEVELS

    def figures(self) -> dict[str, float]:
        """As a job's answer tells it."""
        figures = {"largest_difference": float(self.largest), "mean_difference": self.mean}
        return figures if self.psnr_db is None else {**figures, "psnr_db": self.psnr_db}


def difference(one_HWC: np.ndarray, other_HWC: np.ndarray) -> Difference:
    """The difference of two uint8 images [h, w, 3] of one size."""
    gaps = abs(one_HWC.astype(int) - other_HWC.astype(int))
    mean_square = float((gaps**2).mean())
    psnr_db = 10 * math.log10(255**2 / mean_square) if mean_square else None
    return Difference(int(gaps.max()), float(gaps.mean()), psnr_db)


def run(config: RegenerateJobConfig) -> JobResult:
    """Draw the image again and put it at `output`; the status says how it came out.

    "identical": the same bytes; "within tolerance": pixels as near as another device or version brings them;
    "differs": neither. The figures tell the difference, the details which device drew then and now.
    """
    data, provenance = _read(config)
    from pipeline.media.images import decode_image, read_provenance
    from pipeline.sample.regenerate import regenerate

    again = regenerate(data, model_uri=config.model_uri, codec_path=config.codec)
    try:
        root, name = place_of(config.output)
        root.put(name, again)
    except _unreadable() as error:
        raise InputError(
            f"The image cannot be written: {describe(error)}", key="output", value=config.output
        ) from None
    same, apart = again == data, difference(decode_image(data), decode_image(again))
    status = "identical" if same else "within tolerance" if apart.tolerable else "differs"
    counts = {"images": 1, "identical": int(same), "within_tolerance": int(same or apart.tolerable)}
    devices = {"device_then": provenance["draw"]["device"], "device_now": read_provenance(again)["draw"]["device"]}
    outputs = {"image": config.output, "sha256": hashlib.sha256(again).hexdigest()}
    return JobResult(status, counts, outputs, figures=apart.figures(), details=devices)


def dry_run(config: RegenerateJobConfig) -> JobResult:
    """What the image says about itself; writes nothing."""
    _, provenance = _read(config)
    outputs = {"model": str(provenance["model"]["uri"]), "codec": str(provenance["codec"]["path"])}
    return JobResult("dry-run", {"images": 1}, {"request": str(provenance["request_id"]), **outputs})


def _read(config: RegenerateJobConfig) -> tuple[bytes, dict[str, Any]]:
    """The image's bytes and its provenance."""
    from pipeline.media.images import read_provenance

    try:
        root, name = place_of(config.image)
        data = root.read_bytes(name)
    except _unreadable() as error:
        raise InputError(
            f"The image cannot be read: {describe(error)}",
            key="image",
            value=config.image,
            rule="a PNG, JPEG or WebP file that jobs.sample made",
            next_step="correct the path",
        ) from None
    return data, read_provenance(data)


def _unreadable() -> tuple[type[Exception], ...]:
    return (*storage_errors(), ValueError)
