"""Traces of a few steps and the figures of the machine, by settings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pipeline.tracking.store import MlflowStore
from pipeline.train import job
from pipeline.train.hooks import profiled
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process


def test_the_steps_asked_for_are_in_the_trace_from_the_third_on() -> None:
    import torch

    traces: list[bytes] = []
    with profiled(2, traces.append) as after_step:
        for size in range(1, 7):
            torch.ones(size, size) @ torch.ones(size, size)
            after_step()
    (trace,) = traces
    names = [event["name"] for event in json.loads(gzip.decompress(trace))["traceEvents"] if "name" in event]
    assert names.count("aten::mm") == 2
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#2", "ProfilerStep#3"}


def test_nothing_is_recorded_unasked() -> None:
    with profiled(0, lambda _trace: pytest.fail("a trace")) as after_step:
        after_step()


@pytest.mark.integration
def test_the_job_keeps_the_trace_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_process(monkeypatch, tmp_path)
    uri = make_dataset(tmp_path / "data")
    job.run(job_config(tmp_path, uri, {"train": {"images": 96, "profile_steps": 2, "decay_images": 0}}))
    (trace,) = (tmp_path / "run" / "profiles").glob("*.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "Optimizer.step#AdamW.step" in names


@pytest.mark.integration
def test_the_machine_s_figures_go_on_from_one_start_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_process(monkeypatch, tmp_path)
    uri, store = make_dataset(tmp_path / "data"), f"sqlite:///{tmp_path}/mlflow.db"
    tracking = {"enabled": True, "uri": store, "journal_dir": str(tmp_path / "journal"), "close_timeout_s": 60}
    points = []
    for images in (320, 640):
        train = {"images": images, "system_metrics_s": 0.05, "decay_images": 0}
        result = job.run(job_config(tmp_path, uri, {"train": train, "tracking": tracking}))
        client = MlflowStore(store).client
        figures = client.get_run(result.run_id).data.metrics
        assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(figures)
        history = client.get_metric_history(result.run_id, "system/cpu_utilization_percentage")
        points.append({(point.step, point.value) for point in history})
    assert points[0] < points[1]
