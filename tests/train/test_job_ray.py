"""The whole job on a real Ray: a killed worker, a SIGTERM to the driver, the same command again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.config import merge, validate
from pipeline.model.export import load_export
from pipeline.storage import Root
from pipeline.store.dataset import LatentDataset
from pipeline.train.checkpoint import list_complete
from pipeline.train.config import TrainJobConfig
from pipeline.train.control import claim_generation
from pipeline.train.handshake import handshake
from pipeline.train.history import read_records
from tests.train.dataset import make_dataset
from tests.train.helpers import on_ranks
from tests.train.job_config import job_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 240
LENGTH = {"train": {"images": STEPS * 16, "num_workers": 2}, "checkpoint": {"every_images": 20 * 16}}


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("latents"))


def _undisturbed(values: dict[str, Any], scratch: str) -> None:
    from pipeline.train.worker import Place, run_worker

    config = validate(TrainJobConfig, values)
    facts = handshake(config, LatentDataset.open(config.data.uri))
    run_worker(config, Place("cpu", 1, None, facts, True, Path(scratch)))


@pytest.fixture(scope="module")
def undisturbed(data_uri: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run on two processes without Ray, that nothing ever interrupted."""
    path = tmp_path_factory.mktemp("undisturbed")
    config = job_config(path, data_uri, LENGTH)
    claim_generation(Root(config.output.uri), {})
    on_ranks(2, _undisturbed, config.model_dump(mode="json"), str(path / "scratch"))
    return weights(config)


def weights(config: TrainJobConfig) -> dict[str, torch.Tensor]:
    return load_export(config.output.uri + "/model")[0].state_dict()


class Driver:
    """A job in a process of its own."""

    def __init__(self, config: TrainJobConfig, tmp_path: Path) -> None:
        self.config, self.root = config, Root(config.output.uri)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config.model_dump(mode="json")))
        repository = Path(__file__).parents[2]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment["PYTHONPATH"] = str(repository)
        self.log_path = tmp_path / "driver.log"
        self.log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.drive", str(file)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def wait_until(self, condition: Callable[[], Any], what: str, timeout_s: float = 300) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            assert self.process.poll() is None, f"the driver ended before {what}: {self.said()}"
            time.sleep(0.1)
        raise AssertionError(f"timed out waiting for {what}: {self.said()}")

    def said(self) -> str:
        return self.log_path.read_text()[-3000:]

    def has_checkpoint_between(self) -> bool:
        """In the middle: a checkpoint is complete, and the end is not near."""
        done = list_complete(self.root.child("checkpoints"))
        return bool(done) and 0 < done[-1].images < STEPS * 16 // 2

    def workers(self) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for process in family:
            try:
                if any("RayTrainWorker" in part for part in process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def answer(self) -> tuple[int, dict[str, Any] | None]:
        out, _ = self.process.communicate(timeout=400)
        lines = out.decode().strip().splitlines()
        return self.process.returncode, json.loads(lines[-1]) if lines else None


def test_a_killed_worker_costs_time_and_nothing_else(
    data_uri: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    config = job_config(tmp_path, data_uri, LENGTH)
    driver = Driver(config, tmp_path)
    driver.wait_until(driver.has_checkpoint_between, "a checkpoint")
    driver.wait_until(driver.workers, "a worker")[-1].kill()
    code, answer = driver.answer()
    assert code == 0, driver.said()
    assert answer is not None
    assert answer["result"]["status"] == "done"
    assert answer["result"]["counts"] == {"steps": STEPS, "images": STEPS * 16, "skipped_steps": 0}
    found = weights(config)
    for key, value in undisturbed.items():
        assert torch.equal(found[key], value), key
    steps = [r["step"] for r in read_records(Root(config.output.uri))]
    assert steps == sorted(set(steps))

    # The same command again: at once, and without what takes seconds to import.
    code, answer = Driver(config, tmp_path).answer()
    assert code == 0
    assert answer is not None
    assert answer["result"]["status"] == "unchanged"
    assert answer["imported"] == []


def test_sigterm_checkpoints_and_exits_75_and_the_same_command_finishes(
    data_uri: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    # Tracked, and with checkpoints so rare that the one found can only be due to the signal.
    tracking = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db", "journal_dir": str(tmp_path / "journal")}
    rare = {"checkpoint": {"every_images": 1_000_000}, "tracking": tracking}
    config = job_config(tmp_path, data_uri, merge(LENGTH, rare))
    driver = Driver(config, tmp_path)
    driver.wait_until(lambda: read_records(driver.root), "the first figures")
    driver.process.send_signal(signal.SIGTERM)
    code, _ = driver.answer()
    assert code == 75, driver.said()
    (left,) = list_complete(Root(config.output.uri).child("checkpoints"))
    assert 0 < left.images < STEPS * 16

    driver = Driver(config, tmp_path)
    code, answer = driver.answer()
    assert code == 0, driver.said()
    assert answer is not None
    assert answer["result"]["mlflow_run_id"]
    found = weights(config)
    for key, value in undisturbed.items():
        assert torch.equal(found[key], value), key
    assert load_export(config.output.uri + "/model")[1].run_id == answer["result"]["mlflow_run_id"]


def test_a_diverged_run_ends_with_its_own_words_and_not_with_rays(data_uri: str, tmp_path: Path) -> None:
    settings = {"train": {"images": 3200, "num_workers": 2, "guard_norm": 1e-12, "max_skipped_in_a_row": 3}}
    driver = Driver(job_config(tmp_path, data_uri, settings), tmp_path)
    code, _ = driver.answer()
    assert code == 1
    assert "Training diverged: 3 steps in a row" in driver.said()
    skipped = read_records(driver.root, "quarantine.jsonl")
    assert [r["step"] for r in skipped] == [0, 1, 2]
    assert len(skipped[0]["sample_ids"]) == 16
