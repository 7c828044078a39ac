"""A figure with its interval and its contract, and the record that one evaluation leaves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.evaluate.intervals import Estimate

FORMAT = "latentloom.evaluation.v1"


@dataclass(frozen=True)
class Figure:
    """One result.

    Value, 95 % interval (None where none can be given), n, unit, and how it was taken in words.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    method: str

    @classmethod
    def of(cls, name: str, estimate: Estimate, unit: str, method: str) -> Figure:
        low, high = (v if math.isfinite(v) else None for v in (estimate.low, estimate.high))
        return cls(name, estimate.value, low, high, estimate.n, unit, method)


@dataclass(frozen=True)
class Record:
    """What `evaluation.json` holds.

    key: digest of inputs and configuration; contract: what the figures depend on (extractor hash, resize,
    sampler, seeds); inputs: uri, digest and run id of everything read; absent: figures that could not be
    taken, and why; missed: thresholds that were not reached; files: sha256 of the other files of this
    evaluation.
    """

    key: str
    figures: tuple[Figure, ...]
    contract: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    absent: dict[str, str]
    missed: tuple[str, ...]
    counts: dict[str, int]
    run_id: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """The value of a figure by name, None when it is absent."""
        return next((f.value for f in self.figures if f.name == name), None)

    def flat(self) -> dict[str, float]:
        """name, name_low and name_high of every figure, for the answer line and the tracker."""
        out: dict[str, float] = {}
        for figure in self.figures:
            out[figure.name] = figure.value
            if figure.low is not None and figure.high is not None:
                out[f"{figure.name}_low"], out[f"{figure.name}_high"] = figure.low, figure.high
        return out

    def to_bytes(self) -> bytes:
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record | None:
        """None for anything that is no record of this format."""
        try:
            body = json.loads(data)
            if body.pop("format", None) != FORMAT:
                return None
            figures = tuple(Figure(**f) for f in body.pop("figures"))
            return cls(figures=figures, missed=tuple(body.pop("missed")), **body)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
