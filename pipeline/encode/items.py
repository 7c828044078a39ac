"""What travels from decoding to the device: one future row, with its pixels or the reason why it has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Item:
    """One future row of ENCODED: its values, and uint8 pixels [h, w, 3] unless its outcome is already known."""

    values: dict[str, Any]
    pixels: npt.NDArray[np.uint8] | None


def rejection(status: str, reason: str, message: str) -> dict[str, Any]:
    """The outcome columns of a row that has no latent."""
    return {"outcome": status, "variants": 0, "reason": str(reason), "message": message[:500]}
