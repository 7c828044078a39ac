"""What a training run tells whoever watches the cluster, besides its own history and the tracker."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.dataflow.monitor import MonitorState
from pipeline.storage.root import Root
from pipeline.tracking.tracker import NoopTracker
from tests.infra.test_infra_valid import metric_names

pytestmark = pytest.mark.integration


def test_a_report_tells_progress_checkpoint_and_queue() -> None:
    from pipeline.train.retention import History
    from pipeline.train.worker import BackgroundQueue, Reporter

    class Behind(NoopTracker):
        def num_unsent_bytes(self) -> int:
            return 4096

    told: dict[str, float] = {}
    at = time.time() - 3600
    checkpoints = cast(Any, SimpleNamespace(completed_at=at))
    root = Root("memory://infra-metrics")
    background = BackgroundQueue("reports")
    reporter = Reporter(root, History(root), Behind(), checkpoints, background, told.update)
    reporter.resume(cast(Any, SimpleNamespace(step=0)))
    reporter.log({"step": 3, "images": 96, "loss": 0.5, "images_per_s": 12.0})
    background.flush()
    background.close()
    assert told["images"] == 96
    assert told["checkpoint_time_s"] == at
    assert told["tracking_unsent_bytes"] == 4096
    assert told["loss"] == 0.5


def test_gauges_have_the_names_that_rules_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, description: str) -> None:
            self.name = name

        def set(self, value: float) -> None:
            made[self.name] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    monitor = MonitorState("train")
    monitor.show({"images": 64, "val/loss": 0.1, "checkpoint_time_s": 5.0})
    monitor.show({"images": 128})
    assert monitor.totals()[0] == {"images": 128, "val/loss": 0.1, "checkpoint_time_s": 5.0}
    assert made == {"latentloom_train_images": 128.0, "latentloom_train_checkpoint_time_s": 5.0}
    assert set(made) <= metric_names()
