"""What becomes of a source row: pixels that will be a latent, the latent, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Decoded:
    """One variant of a source row, ready for the device: its columns but for the latent, and uint8 pixels [h, w, 3].

    variants: how many the source row has become.
    """

    values: dict[str, Any]
    variants: int
    pixels: npt.NDArray[np.uint8]

    @property
    def place(self) -> tuple[int, int, int]:
        """(unit, row, variant)."""
        return self.values["unit"], self.values["row"], self.values["variant"]


@dataclass(frozen=True)
class Encoded:
    """A variant with its latent: little-endian bytes, C order, and their shape [c, h, w]."""

    decoded: Decoded
    latent: bytes
    shape: tuple[int, ...]

    @property
    def place(self) -> tuple[int, int, int]:
        """(unit, row, variant)."""
        return self.decoded.place


@dataclass(frozen=True)
class Rejected:
    """A source row that becomes no latent; status: "rejected", or "filtered" where a rule of the user says so."""

    unit: int
    row: int
    key: str
    uri: str
    status: str
    reason: str
    message: str

    @property
    def place(self) -> tuple[int, int, int]:
        """(unit, row, variant)."""
        return self.unit, self.row, 0


@dataclass(frozen=True)
class UnitEnd:
    """The end of a unit whose number of rows was unknown until it was read."""

    unit: int
    rows: int

    @property
    def place(self) -> tuple[int, int, int]:
        """Before all rows of its unit."""
        return self.unit, -1, 0


Item = Decoded | Rejected | UnitEnd  # to the encoder
Outcome = Encoded | Rejected | UnitEnd  # from it
