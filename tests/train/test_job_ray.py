"""The whole job on a real Ray: a killed worker, a SIGTERM to the driver, the same command again."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import merge, validate
from pipeline.model.load import load_model
from pipeline.storage.root import Root
from pipeline.store.read.dataset import LatentDataset
from pipeline.train.checkpoint import list_complete
from pipeline.train.checks import handshake
from pipeline.train.config import TrainJobConfig
from pipeline.train.retention import read_records
from pipeline.train.start import Start
from pipeline.train.worker import read_quarantine
from tests.support.training import new_start
from tests.train.dataset import make_dataset
from tests.train.driver import Driver
from tests.train.helpers import on_ranks
from tests.train.job_config import job_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Drive = Callable[[TrainJobConfig, Path], Driver]
STEPS = 240
LENGTH = {"train": {"images": STEPS * 16, "num_workers": 2}, "checkpoint": {"every_images": 20 * 16}}


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("latents"))


def _undisturbed(values: dict[str, Any], scratch: str) -> None:
    from pipeline.train.worker import WorkerContext, run_worker

    config = validate(TrainJobConfig, values)
    facts = handshake(Start(config), LatentDataset.open(config.data.uri))
    run_worker(config, WorkerContext("cpu", 1, None, facts, True, Path(scratch)))


@pytest.fixture(scope="module")
def undisturbed(data_uri: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run on two processes without Ray, that nothing ever interrupted."""
    path = tmp_path_factory.mktemp("undisturbed")
    config = job_config(path, data_uri, LENGTH)
    new_start(Root(config.output.uri))
    on_ranks(2, _undisturbed, config.model_dump(mode="json"), str(path / "scratch"))
    return weights(config)


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Starts drivers, and leaves none behind."""
    drivers: list[Driver] = []

    def start(config: TrainJobConfig, folder: Path) -> Driver:
        drivers.append(Driver(config, folder))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.end()


def tracked(folder: Path) -> dict[str, Any]:
    """Tracking in a folder of the test's own."""
    where = {"uri": f"sqlite:///{folder}/mlflow.db", "journal_dir": str(folder / "journal")}
    return {"tracking": {"enabled": True, **where}}


def metric_points(folder: Path) -> list[tuple[str, str, int]]:
    """(run, key, step) of every point of the training runs in the tracking store."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store:
        return store.execute("SELECT run_uuid, key, step FROM metrics WHERE key NOT LIKE 'system/%'").fetchall()


def weights(config: TrainJobConfig) -> dict[str, torch.Tensor]:
    return load_model(config.output.uri + "/model")[0].state_dict()


def test_a_killed_worker_costs_time_and_nothing_else(
    data_uri: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path, drive: Drive
) -> None:
    config = job_config(tmp_path, data_uri, merge(LENGTH, tracked(tmp_path)))
    driver = drive(config, tmp_path)
    driver.wait_until(lambda: driver.has_checkpoint_before(STEPS * 16 // 2), "a checkpoint")
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
    # The steps that were done twice are one point each, in the one run there is.
    points = metric_points(tmp_path)
    assert len({run for run, _, _ in points}) == 1
    assert len(set(points)) == len(points)
    assert {step for _, key, step in points if key == "loss"} == {
        r["images"] for r in read_records(Root(config.output.uri)) if "loss" in r
    }

    # The same command again: at once, and without what takes seconds to import.
    code, answer = drive(config, tmp_path).answer()
    assert code == 0
    assert answer is not None
    assert answer["result"]["status"] == "unchanged"
    assert answer["imported"] == []


def test_sigterm_checkpoints_and_exits_75_and_the_same_command_finishes(
    data_uri: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path, drive: Drive
) -> None:
    # Tracked, and with checkpoints so rare that the one found can only be due to the signal.
    rare = {"checkpoint": {"every_images": 1_000_000}, **tracked(tmp_path)}
    config = job_config(tmp_path, data_uri, merge(LENGTH, rare))
    driver = drive(config, tmp_path)
    driver.wait_until(lambda: "loss" in driver.said(), "the first figures")
    driver.process.send_signal(signal.SIGTERM)
    code, _ = driver.answer()
    assert code == 75, driver.said()
    (left,) = list_complete(Root(config.output.uri).child("checkpoints"))
    assert 0 < left.images < STEPS * 16

    driver = drive(config, tmp_path)
    code, answer = driver.answer()
    assert code == 0, driver.said()
    assert answer is not None
    assert answer["result"]["mlflow_run_id"]
    found = weights(config)
    for key, value in undisturbed.items():
        assert torch.equal(found[key], value), key
    assert load_model(config.output.uri + "/model")[1].run_id == answer["result"]["mlflow_run_id"]
    points = metric_points(tmp_path)
    assert len(set(points)) == len(points)
    assert {run for run, _, _ in points} == {answer["result"]["mlflow_run_id"]}


def test_one_worker_and_two_give_the_same_model(data_uri: str, tmp_path: Path, drive: Drive) -> None:
    """Up to the order of float sums: 40 steps of AdamW keep that below 1e-4 of weights of about 0.1."""
    short = {"train": {"images": 40 * 16}, "checkpoint": {"every_images": 1_000_000}}
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        config = job_config(folder, data_uri, merge(short, {"train": {"num_workers": workers}}))
        code, _ = drive(config, folder).answer()
        assert code == 0
        found.append(weights(config))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=0, atol=1e-4, msg=lambda why, at=key: f"{at}: {why}")


def test_a_diverged_run_ends_with_its_own_words_and_not_with_rays(
    data_uri: str, tmp_path: Path, drive: Drive
) -> None:
    settings = {"train": {"images": 3200, "num_workers": 2, "guard_norm": 1e-12, "max_skipped_in_a_row": 3}}
    driver = drive(job_config(tmp_path, data_uri, settings), tmp_path)
    code, _ = driver.answer()
    assert code == 1
    assert "Training diverged: 3 steps in a row" in driver.said()
    skipped = read_quarantine(driver.root)
    assert sorted(skipped["step"].to_pylist()) == [0] * 16 + [1] * 16 + [2] * 16
