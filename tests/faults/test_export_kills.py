"""Kill an export anywhere: the same command finishes it, with the bytes of a run that nothing disturbed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.maintenance.test_export_job import contents, make_bfloat16
from tests.support.jobs import run, start
from tests.support.kills import victims
from tests.support.site import site_environment, slow_disk
from tests.train.dataset import make_dataset

pytestmark = pytest.mark.ray

ROWS = 300
NOBODY = "127.0.0.1:1"  # as RAY_ADDRESS: whoever starts Ray is refused


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export-kills")
    make_dataset(folder / "latents", rows=ROWS)
    return folder


def arguments(output: str, form: str, **extra: object) -> list[str]:
    settings = {
        "data.uri": "latents",
        "output.uri": output,
        "format": form,
        "shard_bytes": 16_384,
        "cluster.num_cpus": 2,
        "cluster.dashboard": "false",
        "tracking.enabled": "false",
        **extra,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def shards(folder: Path) -> set[str]:
    told = json.loads((folder / "export.json").read_bytes())["shards"] if (folder / "export.json").is_file() else []
    return {name for name in told if (folder / name).is_file()}


def busy(command: psutil.Process) -> list[psutil.Process]:
    """Workers that write a shard now: whose temporary file is open."""
    found = []
    for worker in victims(command, "worker"):
        try:
            if any(".tmp-" in file.path for file in worker.open_files()):
                found.append(worker)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("form", ["parquet", pytest.param("lance", marks=pytest.mark.slow)])
def test_a_driver_and_a_worker_that_are_killed_change_nothing(form: str, base: Path, tmp_path: Path) -> None:
    if form == "lance" and importlib.util.find_spec("lance") is None:
        pytest.skip("lance is not installed")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = {"tracking.enabled": "true", "tracking.uri": store, "tracking.journal_dir": tmp_path / "journal"}
    code, calm, errors = run("export", *arguments(f"calm-{form}", form, **tracking), cwd=base)
    assert code == 0, errors
    assert (calm["counts"]["rows"], calm["counts"]["written"]) == (ROWS, calm["counts"]["shards"])
    assert calm["counts"]["shards"] > 8
    assert calm["mlflow_run_id"]
    assert calm["details"]["open"] in errors

    output, slow = base / f"killed-{form}", site_environment(tmp_path / "site", slow_disk("/killed"))
    killed = arguments(output.name, form)
    process = start("export", *killed, cwd=base, env=slow)
    (driver,) = await_(lambda: victims(psutil.Process(process.pid), "driver"), 30)
    await_(lambda: len(shards(output)) >= 2 and busy(psutil.Process(process.pid)), 120)
    os.kill(driver.pid, signal.SIGKILL)
    assert process.wait(60) == 75
    process.communicate()
    time.sleep(2)  # its workers notice and end
    before = shards(output)
    assert 2 <= len(before) < calm["counts"]["shards"]
    kept = {name: (output / name).stat().st_mtime_ns for name in before}

    process = start("export", *killed, cwd=base, env=slow)
    (worker, *_) = await_(lambda: len(shards(output)) > len(before) and busy(psutil.Process(process.pid)), 120)
    os.kill(worker.pid, signal.SIGKILL)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    done = json.loads(out.splitlines()[-1])
    assert done["counts"]["written"] == calm["counts"]["shards"] - len(before)
    assert {name: (output / name).stat().st_mtime_ns for name in before} == kept
    # A version of Lance holds a time and a random name; temporary files of the dead are no objects.
    others = ("data.lance/_versions/", "data.lance/_transactions/")
    there, wanted = (
        {name: d for name, d in contents(folder).items() if not name.startswith(others) and "/.tmp-" not in name}
        for folder in (output, base / f"calm-{form}")
    )
    assert there == wanted

    code, again, errors = run("export", *killed, cwd=base, env={"RAY_ADDRESS": NOBODY})
    assert (code, again.get("status")) == (0, "unchanged"), errors


def test_what_a_worker_cannot_write_is_told_as_what_it_is(base: Path, tmp_path: Path) -> None:
    uri = make_bfloat16(str(tmp_path / "latents"), 1e5)
    code, answer, errors = run(
        "export", *arguments("never", "parquet", **{"data.uri": uri, "dtype": "float16"}), cwd=base
    )
    assert (code, answer["key"], answer["value"]) == (3, "dtype", "float16"), errors
    assert "which float16 cannot hold" in answer["error"]
    assert "Traceback" not in errors
    assert shards(base / "never") == set()


def await_(condition: object, timeout_s: float) -> list[psutil.Process]:
    """What a condition gives, once it is true."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail("it never came to that")
