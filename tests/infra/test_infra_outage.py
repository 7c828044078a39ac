"""A night whose store goes away twice, and the night after it, with the launcher, Ray, S3, PostgreSQL and MLflow.

Kubernetes alone is stood in for: what answers the launcher runs each RayJob's entrypoint here, and tells its end in
the words of KubeRay and Ray. The store is Ceph's gateway, killed and started again; nobody tells a job.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.infra.infra_files import INFRA
from tests.infra.test_infra_night import NIGHT, PROMPTS, Site, add_images, fill
from tests.infra.test_infra_schedules import LAUNCH, Api, ended
from tests.support.mlflow_server import MlflowServer
from tests.support.radosgw import Radosgw
from tests.support.ray_nodes import ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(1800)]

# Long enough to be cut in two.
LONG = "train.images=12800 train.log_images=640 checkpoint.every_images=640"


class Operator(Api):
    """The launcher's Kubernetes: what is created runs at once, one process of this machine a RayJob."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, self.answers, self.codes = site, dict[str, dict[str, Any]](), dict[str, int]()
        self.tracking = site.settings["LATENTLOOM_TRACKING"]
        self.before: dict[str, Callable[[], None]] = {}  # by RayJob: what happens as it begins
        self.mended_after: set[str] = set()  # the RayJobs after whose end the store is there again
        self.wanted: queue.Queue[threading.Event] = queue.Queue()

    def post(self, job: dict[str, Any]) -> tuple[int, Any]:
        name = job["metadata"]["name"]
        if name in self.jobs:
            return 409, {}
        job["metadata"]["creationTimestamp"] = datetime.now(UTC).isoformat()
        job["status"] = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
        self.jobs[name] = job
        self.created.append(name)
        threading.Thread(target=self._run, args=(name, job), daemon=True).start()
        return 201, job

    def _run(self, name: str, job: dict[str, Any]) -> None:
        step, run = (
            job["metadata"]["labels"]["app.kubernetes.io/component"],
            job["metadata"]["labels"]["latentloom/run"],
        )
        self.before.get(name, lambda: None)()
        code, self.answers[name], errors = self.site.run(step, run)
        self.codes[name] = code
        if name in self.mended_after:
            mended = threading.Event()
            self.wanted.put(mended)
            mended.wait(120)
        status = ended(code)
        if code:
            status["message"] += f"\n{errors[-10_000:]}"  # Ray's has the last lines of the job's log
        job["status"] = {**status, "endTime": datetime.now(UTC).isoformat()}


@pytest.fixture(scope="module")
def site(radosgw: Radosgw, mlflow_stack: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder, bucket = tmp_path_factory.mktemp("outage"), radosgw.make_bucket()
    fill(folder / "store")
    upload(radosgw, bucket, folder / "store")
    store = f"s3://{bucket}/store"
    assert mlflow_stack.auth is not None
    env = {
        **radosgw.environment(),
        **mlflow_stack.auth.environment(),
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "OMP_NUM_THREADS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        fetch = [
            sys.executable,
            str(INFRA / "docker" / "fetch_networks.py"),
            f"{store}/networks",
            f"{folder}/networks",
        ]
        subprocess.run(fetch, check=True, capture_output=True)
        with ray_nodes(1, 3) as nodes:
            yield Site(folder, store, mlflow_stack.uri, {**nodes.env, **env})


def upload(radosgw: Radosgw, bucket: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            radosgw.client().upload_file(str(path), bucket, f"store/{path.relative_to(folder)}")


def launch(operator: Operator, run: str, account: Path, store: Radosgw) -> tuple[int, str]:
    """The launcher as its CronJob starts it, with seconds for its minutes; and the store's operator."""
    command = [sys.executable, str(LAUNCH), "--run", run, "--api", operator.url, "--account", str(account), "night"]
    pace = [
        "--period",
        "0.5",
        "--pause",
        "5",
        "--longest-pause",
        "30",
        "--patience",
        "60",
        "--tracking-patience",
        "60",
    ]
    log = account / f"{run}.log"
    with log.open("w") as file, subprocess.Popen([*command, *pace], stdout=file, stderr=file) as launcher:
        while launcher.poll() is None:
            with contextlib.suppress(queue.Empty):
                mended = operator.wanted.get(timeout=0.5)
                store.start_gateway()  # from here: it ends with the thread that started it
                mended.set()
    print(log.read_text())
    return launcher.returncode, log.read_text()


def test_a_night_with_two_outages_and_the_night_after_it(site: Site, radosgw: Radosgw, tmp_path: Path) -> None:
    (tmp_path / "namespace").write_text("latentloom\n")
    (tmp_path / "token").write_text("sesame\n")
    operator, bucket = Operator(site), site.store.split("/")[2]

    def cut_in_training() -> None:
        def watch() -> None:
            client = radosgw.client()
            checkpoints = {"Bucket": bucket, "Prefix": "store/models/nightly-1/checkpoints/"}
            while not any("COMPLETE" in o["Key"] for o in client.list_objects_v2(**checkpoints).get("Contents", ())):
                time.sleep(0.1)
            radosgw.kill_gateway()
            print("the store is gone: training has a checkpoint and goes on")

        threading.Thread(target=watch, daemon=True).start()

    operator.before = {"nightly-1-encode-1": radosgw.kill_gateway, "nightly-1-train-1": cut_in_training}
    operator.mended_after = {"nightly-1-encode-1", "nightly-1-train-1"}
    short, site.small["train"] = site.small["train"], f"{site.small['train']} {LONG}"
    code, said = launch(operator, "nightly-1", tmp_path, radosgw)
    assert code == 0, said
    assert operator.codes["nightly-1-encode-1"] == 3, "it found no store as it began"
    assert operator.codes["nightly-1-train-1"] == 75, "it lost the store, and kept what it had"
    attempts = {"encode": 2, "train": 2}
    assert operator.created == [f"nightly-1-{s}-{n}" for s in NIGHT for n in range(1, attempts.get(s, 1) + 1)]
    first = {step: operator.answers[f"nightly-1-{step}-{attempts.get(step, 1)}"] for step in NIGHT}
    assert first["encode"]["counts"]["latents"] == 40
    assert first["train"]["counts"]["images"] == 12_800
    assert first["verify"]["counts"]["problems"] == 0

    site.small["train"] = short
    add_images(site.folder / "new" / "images", 40, 8)
    upload(radosgw, bucket, site.folder / "new")
    code, said = launch(operator, "nightly-2", tmp_path, radosgw)
    assert code == 0, said
    second = {step: operator.answers[f"nightly-2-{step}-1"] for step in NIGHT}
    assert second["encode"]["counts"]["latents"] == 48
    assert second["sample"]["counts"]["images"] == PROMPTS
    assert second["verify"]["counts"]["problems"] == 0
    assert second["verify"]["counts"]["latents"] == 48
    operator.close()
