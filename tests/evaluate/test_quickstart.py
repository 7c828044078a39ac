"""The quickstart's orchestration, with stand-ins for the jobs it starts: order, exit codes, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
JOBS = ("fit_codec", "encode", "train", "sample", "evaluate")

STAND_IN = """
import json, pathlib, sys
job, answer, code = {job!r}, {answer!r}, {code!r}
with open("calls.txt", "a") as calls:
    print(job, *sys.argv[1:], file=calls)
print("progress of " + job, file=sys.stderr)
print("some other output")
if answer is not None:
    print(json.dumps(answer))
sys.exit(code)
"""


def arrange(folder: Path, *, accuracy: float | None = 0.97, fail: str = "", code: int = 0, mute: str = "") -> None:
    """A working directory with the real quickstart and stand-in jobs."""
    (folder / "jobs").mkdir()
    shutil.copy(REPOSITORY / "jobs" / "quickstart.py", folder / "jobs")
    shutil.copytree(REPOSITORY / "configs" / "quickstart", folder / "configs" / "quickstart")
    for job in JOBS:
        figures = {"accuracy": accuracy, "psnr_db": 26.5} if job == "evaluate" and accuracy is not None else {}
        outputs = {"sample": {"contact": "quickstart/samples/contact_sheet.png"}}.get(job, {"report": "r.html"})
        answer = None if job == mute else {"job": job, "status": "done", "outputs": outputs, "figures": figures}
        script = STAND_IN.format(job=job, answer=answer, code=code if job == fail else 0)
        (folder / "jobs" / f"{job}.py").write_text(script)
    (folder / "jobs" / "__init__.py").write_text("")
    # the pictures are tested on their own: here they are there already
    (folder / "quickstart" / "images").mkdir(parents=True)
    marker = {"version": 1, "count": 4096, "seed": 0, "size": 32}
    (folder / "quickstart" / "images" / ".shapes.json").write_text(json.dumps(marker))


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "jobs.quickstart", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_stages_run_in_order_with_their_configs_and_end_in_one_line_of_figures(tmp_path: Path) -> None:
    arrange(tmp_path)
    result = quickstart(tmp_path)
    assert result.returncode == 0, result.stderr
    assert calls(tmp_path) == [f"{job} configs/quickstart/{job}.yaml" for job in JOBS]
    for job in JOBS:
        assert f"$ python -m jobs.{job} configs/quickstart/{job}.yaml" in result.stdout
        assert f"progress of {job}" in result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("figures: accuracy=0.97 psnr_db=26.5 total=")
    assert all(f"{job}=" in last for job in ("data", *JOBS))
    assert "quickstart/samples/contact_sheet.png" in result.stdout
    assert "Report         r.html" in result.stdout
    assert "mlflow ui --backend-store-uri" in result.stdout


@pytest.mark.parametrize(("code", "expected"), [(3, 3), (75, 75), (1, 1)])
def test_failing_stage_stops_everything_with_its_code_and_the_command(
    tmp_path: Path, code: int, expected: int
) -> None:
    arrange(tmp_path, fail="train", code=code)
    result = quickstart(tmp_path)
    assert result.returncode == expected
    assert [line.split()[0] for line in calls(tmp_path)] == ["fit_codec", "encode", "train"]
    assert "python -m jobs.train configs/quickstart/train.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_stage_without_an_answer_is_a_failure(tmp_path: Path) -> None:
    arrange(tmp_path, mute="encode")
    result = quickstart(tmp_path)
    assert result.returncode == 1
    assert "encode stopped" in result.stderr


@pytest.mark.parametrize("accuracy", [0.89, None])
def test_samples_of_the_wrong_class_fail_the_quickstart(tmp_path: Path, accuracy: float | None) -> None:
    arrange(tmp_path, accuracy=accuracy)
    result = quickstart(tmp_path)
    assert result.returncode == 1
    assert "0.9 was expected" in result.stderr


def test_elsewhere_it_takes_the_configurations_of_the_package(tmp_path: Path) -> None:
    arrange(tmp_path)
    shutil.rmtree(tmp_path / "configs")
    result = quickstart(tmp_path)
    assert result.returncode == 0, result.stderr
    assert calls(tmp_path) == [f"{job} {REPOSITORY}/pipeline/configs/quickstart/{job}.yaml" for job in JOBS]


def test_help_runs_nothing(tmp_path: Path) -> None:
    arrange(tmp_path)
    assert quickstart(tmp_path, "--help").returncode == 0
    assert quickstart(tmp_path, "--fast").returncode == 2
    assert calls(tmp_path) == []
