"""The driver's side that needs no Ray: the dry run, and a run that is already done."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import logger as coordinator

from pipeline.config import config_digest
from pipeline.errors import StoppedError
from pipeline.storage.root import Root
from pipeline.train import job
from pipeline.train.job import dry_run, run
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("latents"))


def test_a_dry_run_counts_and_writes_nothing(data_uri: str, tmp_path: Path) -> None:
    config = job_config(tmp_path, data_uri, {"train": {"micro_batch": 6}, "stream": {"holdout": 0.25}})
    result = dry_run(config)
    assert result.status == "dry-run"
    assert result.counts == {
        "steps": 20,
        "images": 320,
        "rows": 96,
        "classes": 3,
        "checkpoints": 5,
        "micro_batches_per_step": 3,
    }
    assert result.figures["epochs"] == pytest.approx(320 / 72)
    assert not Path(config.output.uri).exists()


def test_a_finished_run_answers_from_its_note(data_uri: str, tmp_path: Path) -> None:
    config = job._absolute(job_config(tmp_path, data_uri))
    note = {"status": "done", "counts": {"images": 320}, "outputs": {"model": "m"}, "run_id": "r"}
    Root(config.output.uri).put("done.json", json.dumps({"config": config_digest(config), "result": note}).encode())
    result = run(config)
    assert (result.status, result.counts, result.run_id) == ("unchanged", {"images": 320}, "r")


def test_a_stop_is_an_error_that_says_how_far_it_got(
    data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_fit", lambda *_: {"status": "stopped", "step": 5, "images": 80})
    config = job_config(tmp_path, data_uri)
    with pytest.raises(StoppedError, match=r"stopped at 80 of 320 images"):
        run(config)
    assert not Root(config.output.uri).exists("done.json")


def test_losing_workers_too_often_is_resumable_and_says_so(data_uri: str, tmp_path: Path) -> None:
    error = job._lost(job_config(tmp_path, data_uri), RuntimeError("first\nActor died"))
    assert isinstance(error, StoppedError)
    assert "train.max_failures=3 times: Actor died" in str(error)


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_ray_s_controller_is_kept_from_what_misleads(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class PlacementGroupCleanerCallback:
        pass

    class Other:
        pass

    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    trainer = SimpleNamespace(_create_default_callbacks=lambda: [PlacementGroupCleanerCallback(), Other()])
    job._adapt(trainer)
    usual = [type(one).__name__ for one in trainer._create_default_callbacks()[:-1]]
    assert usual == ["Other"] if address is None else ["PlacementGroupCleanerCallback", "Other"]
    # Ray's own module asks this logger, in the process that has unpickled the callbacks.
    monkeypatch.setattr(coordinator, "level", logging.WARNING)
    cloudpickle.loads(cloudpickle.dumps(trainer._create_default_callbacks()))
    assert coordinator.level == logging.ERROR
