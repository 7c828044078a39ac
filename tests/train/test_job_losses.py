"""What a run loses without losing anything: its driver, a node of its cluster. And a run on several datasets."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import merge, validate
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import latest_number
from pipeline.train.checkpoint import list_complete
from pipeline.train.config import TrainJobConfig
from pipeline.train.inputs import open_served, open_stream
from pipeline.train.retention import read_records
from tests.support.ray_nodes import ray_nodes
from tests.train.dataset import make_dataset
from tests.train.driver import Driver
from tests.train.job_config import job_config
from tests.train.test_job_ray import LENGTH, STEPS, data_uri, metric_points, tracked, undisturbed, weights

__all__ = ["data_uri", "undisturbed"]  # fixtures

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Drive = Callable[..., Driver]


@pytest.fixture
def drive() -> Iterator[Drive]:
    """Starts drivers, and leaves none behind."""
    drivers: list[Driver] = []

    def start(config: TrainJobConfig, folder: Path, env: dict[str, str] | None = None) -> Driver:
        drivers.append(Driver(config, folder, env))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.end()


def wait_for_step(driver: Driver, step: int) -> int:
    """Wait until a checkpoint of this step or a later one is complete; the step of the newest."""

    def newest() -> int:
        complete = list_complete(driver.root.child("checkpoints"))
        return complete[-1].images // 16 if complete and complete[-1].images >= step * 16 else 0

    return int(driver.wait_until(newest, f"a checkpoint at step {step}"))


def logged_images(config: TrainJobConfig) -> list[int]:
    return [r["images"] for r in read_records(Root(config.output.uri)) if "loss" in r]


def test_a_driver_killed_at_any_step_is_replaced_by_the_same_command(
    data_uri: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path, drive: Drive
) -> None:
    config = job_config(tmp_path, data_uri, merge(LENGTH, tracked(tmp_path)))
    driver = drive(config, tmp_path)
    at = random.randrange(20, STEPS // 2)
    killed_at = wait_for_step(driver, at)
    time.sleep(random.uniform(0.0, 0.5))  # somewhere between two checkpoints
    driver.process.kill()
    assert driver.process.wait() == -9
    assert killed_at < STEPS, f"aimed at {at}"

    again = drive(config, tmp_path)
    code, answer = again.answer()
    assert code == 0, again.said()
    assert answer is not None
    assert answer["result"]["status"] == "done"
    assert answer["result"]["counts"] == {"steps": STEPS, "images": STEPS * 16, "skipped_steps": 0}
    assert latest_number(driver.root) == 2
    found = weights(config)
    for key, value in undisturbed.items():
        assert torch.equal(found[key], value), f"{key}, killed at step {killed_at}"
    # Every report once, and one point for each in the one run there is.
    every = config.train.log_images
    assert logged_images(config) == list(range(every, STEPS * 16 + 1, every))
    points = metric_points(tmp_path)
    assert {run for run, _, _ in points} == {answer["result"]["mlflow_run_id"]}
    assert len(set(points)) == len(points)
    assert {step for _, key, step in points if key == "loss"} == set(logged_images(config))


def test_a_lost_node_leaves_the_run_to_the_other_one(
    data_uri: str, undisturbed: dict[str, torch.Tensor], tmp_path: Path, drive: Drive
) -> None:
    """The same global batch on one worker instead of two: the same weights up to the order of float sums."""
    config = job_config(tmp_path, data_uri, merge(LENGTH, {"train": {"min_workers": 1}}))
    with ray_nodes(1, 1) as cluster:
        driver = drive(config, tmp_path, cluster.env)
        wait_for_step(driver, 20)
        assert first_world_size(driver.root) == 2
        cluster.raylet(1).kill()
        code, answer = driver.answer()
        assert code == 0, driver.said()
    assert answer is not None
    assert answer["result"]["counts"] == {"steps": STEPS, "images": STEPS * 16, "skipped_steps": 0}
    (last,) = list_complete(driver.root.child("checkpoints"))[-1:]
    assert (last.images, last.marker["world_size"]) == (STEPS * 16, 1)
    every = config.train.log_images
    assert logged_images(config) == list(range(every, STEPS * 16 + 1, every))
    found = weights(config)
    for key, value in undisturbed.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4, msg=lambda why, at=key: f"{at}: {why}")


def first_world_size(root: Root) -> int:
    """The number of workers that wrote the oldest checkpoint that is kept."""
    return int(list_complete(root.child("checkpoints"))[0].marker["world_size"])


def test_two_workers_train_on_two_datasets_in_their_shares(data_uri: str, tmp_path: Path, drive: Drive) -> None:
    steps = 48
    other = make_dataset(tmp_path / "two", rows=80, classes=5, name="two")
    values: dict[str, Any] = job_config(tmp_path, data_uri).model_dump(mode="json")
    values["data"] |= {"weight": 3.0, "mix": [{"uri": other, "weight": 1.0}]}
    values["train"] |= {"images": steps * 16, "log_images": 16, "num_workers": 2}
    config = validate(TrainJobConfig, values)
    driver = drive(config, tmp_path)
    code, answer = driver.answer()
    assert code == 0, driver.said()
    assert answer is not None
    assert answer["result"]["counts"] == {"steps": steps, "images": steps * 16, "skipped_steps": 0}
    # A report per step names the dataset of its batch: three of four are the first one's, to a batch or so.
    records = [r for r in read_records(Root(config.output.uri)) if "loss" in r]
    shares = Counter("two" if "epoch_mix0" in r else "one" for r in records)
    assert shares == served(config, steps)
    assert abs(shares["two"] - steps / 4) <= 2


def served(config: TrainJobConfig, steps: int) -> Counter[str]:
    """How many of the first steps each dataset serves on a single worker."""
    stream = open_stream(config, open_served(config), Root(config.output.uri))
    try:
        return Counter("two" if batch.dataset else "one" for batch in islice(stream.batches_from(0), steps))
    finally:
        stream.close()
