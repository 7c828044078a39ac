"""A training whose Ray goes away, on a machine where another Ray is the one that everybody finds first."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config import dump_yaml
from pipeline.storage.root import Root
from pipeline.train.checkpoint import list_complete
from tests.support.jobs import start
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config

pytestmark = pytest.mark.ray


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray that says where another cluster is; its name is short, for those of sockets are limited."""
    folder = Path(tempfile.mkdtemp(prefix="lt-", dir="/tmp"))
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    yield folder
    shutil.rmtree(folder)


def controllers(pid: int) -> list[psutil.Process]:
    """Of the Ray Train that a process runs."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "TrainController" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_training_whose_ray_ends_stops_with_its_work_kept(tmp_path: Path, ray_folder: Path) -> None:
    config = job_config(tmp_path, make_dataset(tmp_path / "latents"), {"train": {"images": 16 * 100_000}})
    file = tmp_path / "train.yaml"
    file.write_text(dump_yaml(config))
    job = start("train", file, cwd=tmp_path, env={"RAY_TMPDIR": str(ray_folder)})
    try:
        place, until = Root(config.output.uri).child("checkpoints"), time.monotonic() + 300
        while not list_complete(place):
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        (controller,) = controllers(job.pid)
        controller.kill()
        said, errors = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 75, errors
    answer = json.loads(said.splitlines()[-1])
    assert (answer["status"], answer["rule"]) == ("stopped", "what was committed is kept")
    assert "Ray, or a process that it keeps for this job, is gone" in errors
    assert "this is a bug" not in errors
    # Not even under load, when Ray's autoscaler answers late.
    assert "Traceback" not in errors
    assert "train  0/1,600,000 images 0%" in errors  # said before the first loss is there
    # What looks after a cluster would have asked the other one whether this training lives.
    assert "PlacementGroupCleaner" not in errors
