"""The training job with its one worker in the driver's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.root import Root
from pipeline.train import job
from pipeline.train.config import TrainJobConfig
from pipeline.train.pinned_inputs import Begun
from pipeline.train.worker import WorkerContext, run_worker


def in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From here on `job.run` runs its worker itself instead of asking Ray for one."""

    def fit(config: TrainJobConfig, root: Root, generation: int, handle: str | None, begun: Begun) -> dict[str, Any]:
        scratch = tmp_path / "scratch"
        return run_worker(
            config,
            WorkerContext(
                "cpu", generation, handle, begun.facts, True, scratch, inputs=begun.inputs, order=begun.order
            ),
        )

    monkeypatch.setattr(job, "_fit", fit)
