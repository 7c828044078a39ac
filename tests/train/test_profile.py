"""Traces of a few steps, by a setting."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

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
