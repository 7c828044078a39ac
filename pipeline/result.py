"""What a job returns: the content of the last line on standard output."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class JobResult:
    """The outcome of one job run.

    `status` is "done" (work was done), "unchanged" (everything was done before) or "dry-run". `counts`
    are whole numbers of things, `rates` are per second, `figures` are results (accuracy, dB), `outputs`
    name URIs, `run_id` is the MLflow run; `details` is JSON for jobs whose answer has a form of its own.
    """

    status: str
    counts: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    run_id: str | None = None
    rates: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self, job: str) -> str:
        """One line of strict JSON (no NaN), keys in a fixed order."""
        return json.dumps(
            {
                "job": job,
                "status": self.status,
                "counts": self.counts,
                "outputs": self.outputs,
                "mlflow_run_id": self.run_id,
                "rates": {k: _short(v) for k, v in self.rates.items()},
                "figures": {k: _short(v) for k, v in self.figures.items()},
                **({"details": self.details} if self.details else {}),
            },
            allow_nan=False,
        )


def _short(value: float) -> float | None:
    """A float with four significant digits after rounding; None for what JSON cannot hold."""
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.6g}")
