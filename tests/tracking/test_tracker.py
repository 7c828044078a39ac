"""Trackers over a real sqlite store."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.tracking.config import TrackingConfig, resolve_paths
from pipeline.tracking.delivery import replay
from pipeline.tracking.journal import JournalReader, journals
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import JournalTracker, NoopTracker, Tracker, attach_tracker, open_tracker
from tests.support.mlflow_server import free_port

pytestmark = pytest.mark.integration

SECRET = "planted-Secret-77"


def start(tracking: TrackingConfig, **changes: object) -> Tracker:
    arguments: dict[str, object] = {"job": "train", "run_name": "a run", "resume_run_id": None, "parents": {}}
    return open_tracker(tracking, **{**arguments, **changes})  # type: ignore[arg-type]


def points(uri: str, run_id: str | None, key: str = "loss") -> list[tuple[int, float]]:
    assert run_id is not None
    history = MlflowStore(uri).client.get_metric_history(run_id, key)
    return sorted((m.step, m.value) for m in history)


def unreachable(tracking: TrackingConfig) -> TrackingConfig:
    return tracking.model_copy(update={"uri": f"http://127.0.0.1:{free_port()}"})


def test_a_run_holds_everything_it_was_told(tracking: TrackingConfig, tmp_path: Path) -> None:
    tracker = start(tracking, parents={"encode": "e" * 32})
    tracker.log_params({"lr": 1e-4, "model": {"kind": "dit"}})
    for step in range(20):
        tracker.log_metrics({"loss": 1.0 / (step + 1), "bad": float("nan")}, step=step)
    tracker.log_text("a: 1\n", "config/resolved.yaml")
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"png")
    tracker.log_file(sheet, "samples/contact.png")
    tracker.log_input("latents", "ab" * 32, "/data/latents", "input")
    tracker.log_input("latents", "cd" * 32, "/data/more", "input", {"latentloom.weight": "0.5"})
    tracker.set_tags({"note": "first", "team": "vision"})
    tracker.set_tags({"note": "second"})
    tracker.finish("FINISHED")

    run = MlflowStore(tracking.uri).client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert run.info.end_time is not None
    told = {str(i.dataset.digest)[:2]: {t.key: t.value for t in i.tags} for i in run.inputs.dataset_inputs}
    assert (told["cd"]["latentloom.weight"], "latentloom.weight" in told["ab"]) == ("0.5", False)
    assert run.data.params == {"lr": "0.0001", "model": "{'kind': 'dit'}"}
    wanted = {"note": "second", "team": "vision", "latentloom.job": "train", "latentloom.parent.encode": "e" * 32}
    assert wanted.items() <= run.data.tags.items()
    assert {"latentloom.python", "latentloom.host"} <= run.data.tags.keys()
    assert points(tracking.uri, tracker.run_id) == [(i, 1.0 / (i + 1)) for i in range(20)]
    assert len(points(tracking.uri, tracker.run_id, "bad")) == 20
    artifacts = Path(tracking.uri.removeprefix("sqlite:///")).parent / "mlartifacts" / "latentloom"
    files = {p.name: p.read_bytes() for p in artifacts.rglob("*") if p.is_file()}
    assert b"\nmlflow==" in files.pop("requirements.txt")
    assert files == {"resolved.yaml": b"a: 1\n", "contact.png": b"png"}
    assert journals(Path(tracking.journal_dir)) == []
    assert not (Path.cwd() / "mlruns").exists()


def test_images_by_step_are_named_as_mlflows_own_client_names_them(tracking: TrackingConfig) -> None:
    tracker = start(tracking)
    for step in (0, 64):
        tracker.log_image(f"png {step}".encode(), b"webp", "grid", step)
    tracker.finish("FINISHED")
    client = MlflowStore(tracking.uri).client
    theirs = client.create_run(client.get_experiment_by_name("latentloom").experiment_id).info.run_id
    client.log_image(theirs, np.zeros((2, 2, 3), np.uint8), key="grid", step=64)

    def shapes(run_id: str) -> set[str]:
        """Names with time and random part taken out."""
        names = (file.path for file in client.list_artifacts(run_id, "images"))
        return {re.sub(r"timestamp\+\d+\+[0-9a-f-]{36}", "timestamp+T+U", name) for name in names}

    ours = shapes(str(tracker.run_id))
    assert shapes(theirs) < ours
    assert ours == {
        f"images/grid+step+{step}+timestamp+T+U{end}" for step in (0, 64) for end in (".png", "+compressed.webp")
    }
    tag = "mlflow.loggedImages"
    assert client.get_run(tracker.run_id).data.tags[tag] == client.get_run(theirs).data.tags[tag]
    with pytest.raises(InputError, match="cannot be the name"):
        start(tracking).log_image(b"", b"", "a+b", 0)


def test_a_resumed_run_goes_on_without_double_points_or_params(tracking: TrackingConfig) -> None:
    first = start(tracking)
    first.log_params({"lr": 1})
    for step in range(1, 11):
        first.log_metrics({"loss": step}, step=step)
    first.finish("FAILED")
    second = start(tracking, resume_run_id=first.run_id)
    assert second.run_id == first.run_id  # known at once
    second.log_params({"lr": 1, "late": 2})
    for step in range(6, 15):
        second.log_metrics({"loss": step}, step=step)
    second.finish("FINISHED")
    assert points(tracking.uri, first.run_id) == [(i, float(i)) for i in range(1, 15)]
    run = MlflowStore(tracking.uri).client.get_run(first.run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "1", "late": "2"})


def test_a_run_that_is_gone_is_replaced_and_says_so(tracking: TrackingConfig) -> None:
    tracker = start(tracking, resume_run_id="0" * 32)
    assert tracker.wait_run_id(60) != "0" * 32
    tracker.finish("FINISHED")
    state = MlflowStore(tracking.uri).run_state(str(tracker.run_id))
    assert state is not None
    assert state.tags["latentloom.resumes"] == "0" * 32


def test_a_handle_leads_to_the_run_before_it_has_an_id(tracking: TrackingConfig) -> None:
    down = unreachable(tracking)
    first = start(down)
    assert first.run_id is None
    handle = first.handle
    assert handle is not None
    assert handle.startswith("key:")
    first.log_metrics({"loss": 1.0}, step=1)
    worker = attach_tracker(down, handle)
    worker.log_metrics({"loss": 2.0}, step=2)
    worker.finish("FINISHED")
    first.finish("FAILED")
    report = replay(tracking.journal_dir, tracking.uri)
    assert (report.sent, report.other_server) == (0, 2)  # written for another address
    report = replay(tracking.journal_dir, tracking.uri, any_server=True)
    assert report.sent == 2
    assert len(set(report.runs)) == 1
    second = start(tracking, resume_run_id=handle)
    second.log_metrics({"loss": 3.0}, step=3)
    second.finish("FINISHED")
    assert second.run_id == report.runs[0]
    assert points(tracking.uri, second.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_an_attached_tracker_cannot_end_the_run(tracking: TrackingConfig) -> None:
    driver = start(tracking)
    worker = attach_tracker(tracking, driver.handle)
    worker.log_metrics({"loss": 1.0}, step=1)
    worker.finish("KILLED")
    assert points(tracking.uri, driver.wait_run_id(60)) == [(1, 1.0)]
    state = MlflowStore(tracking.uri).run_state(str(driver.run_id))
    assert state is not None
    assert state.status == "RUNNING"
    driver.finish("FINISHED")


PROGRAM = """
import os, signal, sys
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.tracker import attach_tracker, open_tracker
tracking = TrackingConfig.model_validate_json(sys.argv[1])
how = sys.argv[2]
if how == "attach":
    tracker = attach_tracker(tracking, sys.argv[3])
else:
    tracker = open_tracker(tracking, job="train", run_name="n", resume_run_id=None, parents={})
for step in range(200):
    tracker.log_metrics({"worker" if how == "attach" else "loss": float(step)}, step=step)
print(tracker.handle, flush=True)
if how == "kill":
    tracker.wait_run_id(60)
    print(tracker.run_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if how == "raise-late":
    tracker.wait_run_id(60)
if how.startswith("raise"):
    raise RuntimeError("the job's own fault")
if how == "attach":
    tracker.finish("FINISHED")
"""


def run_program(tracking: TrackingConfig, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, tracking.model_dump_json(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_killed_process_loses_nothing_and_its_run_ends_killed(tracking: TrackingConfig) -> None:
    done = run_program(tracking, "kill")
    assert done.returncode == -9
    run_id = done.stdout.split()[-1]
    assert replay(tracking.journal_dir, tracking.uri).runs == (run_id,)
    assert points(tracking.uri, run_id) == [(i, float(i)) for i in range(200)]
    state = MlflowStore(tracking.uri).run_state(run_id)
    assert state is not None
    assert state.status == "KILLED"


@pytest.mark.slow
def test_a_process_that_ends_without_finish_has_failed(tracking: TrackingConfig) -> None:
    done = run_program(tracking, "raise-late")
    assert done.returncode == 1
    (run,) = MlflowStore(tracking.uri).search(None, "")
    assert run.status == "FAILED"
    assert len(points(tracking.uri, run.run_id)) == 200
    assert "alembic" not in done.stderr
    assert "INFO" not in done.stderr
    assert done.stdout.count("\n") == 1  # mlflow adds nothing to what the job prints


@pytest.mark.slow
def test_a_process_that_ends_before_mlflow_is_loaded_is_recorded_by_the_next(tracking: TrackingConfig) -> None:
    """Python starts no thread pool while it shuts down, so mlflow can no longer be imported then."""
    done = run_program(tracking, "raise")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1  # the job's own
    if journals(Path(tracking.journal_dir)):
        assert "stay in" in done.stderr
        assert replay(tracking.journal_dir, tracking.uri).sent == 1
    (run,) = MlflowStore(tracking.uri).search(None, "")
    assert run.status == "FAILED"
    assert len(points(tracking.uri, run.run_id)) == 200


@pytest.mark.slow
def test_a_worker_process_logs_into_the_drivers_run_at_the_same_time(tracking: TrackingConfig) -> None:
    driver = start(tracking)
    for step in range(100):
        driver.log_metrics({"loss": float(step)}, step=step)
    done = run_program(tracking, "attach", str(driver.handle))
    assert done.returncode == 0, done.stderr
    for step in range(100, 200):
        driver.log_metrics({"loss": float(step)}, step=step)
    driver.finish("FINISHED")
    for key in ("loss", "worker"):
        assert points(tracking.uri, driver.run_id, key) == [(i, float(i)) for i in range(200)]


def test_no_credential_reaches_journal_or_store(
    tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"aws-{SECRET}")
    down = unreachable(tracking)
    uri = down.uri.replace("http://", f"http://me:{SECRET}@")
    tracker = start(down.model_copy(update={"uri": uri, "tags": {"from": uri}}), run_name=f"run {uri}")
    tracker.log_params({"uri": uri, "pw": SECRET})
    tracker.log_text(f"tracking:\n  uri: {uri}\nkey: aws-{SECRET}\n", "config.yaml")
    tracker.log_input("d", "digest", f"s3://id:{SECRET}@bucket/x", "input")
    tracker.set_tags({"cmd": f"sample {uri} password={SECRET}"})
    tracker.finish("FINISHED")
    written = b"".join(p.read_bytes() for p in Path(tracking.journal_dir).rglob("*") if p.is_file())
    assert b"config.yaml" in written
    assert SECRET.encode() not in written
    assert SECRET not in caplog.text
    assert "stay in" in caplog.text
    assert replay(tracking.journal_dir, tracking.uri, any_server=True).sent == 1
    assert SECRET.encode() not in Path(tracking.uri.removeprefix("sqlite:///")).read_bytes()


def test_opening_raises_for_what_can_never_work(tracking: TrackingConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scheme 'ftp'"):
        start(tracking.model_copy(update={"uri": "ftp://x"}))
    with pytest.raises(ConfigError, match="scheme 'ftp'"):
        attach_tracker(tracking.model_copy(update={"uri": "ftp://x"}), "0" * 32)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="journal cannot be written"):
        start(tracking.model_copy(update={"journal_dir": str(tmp_path / "file" / "j")}))
    with pytest.raises(InputError, match="no handle of a run"):
        start(tracking, resume_run_id="key:'; drop")


def test_wrong_arguments_are_told_at_once(tracking: TrackingConfig) -> None:
    tracker = start(unreachable(tracking))
    with pytest.raises(InputError, match="cannot be the name of a param, metric or tag"):
        tracker.log_metrics({"loss!": 1.0}, step=1)
    for name in ("", "a//b", "../x", "a/", "x" * 251, "/a"):
        with pytest.raises(InputError, match="cannot be the name"):
            tracker.set_tags({name: "x"})
    with pytest.raises(InputError, match="metric 'loss' is a str"):
        tracker.log_metrics({"loss": "high"}, step=1)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="There is no file"):
        tracker.log_file("/no/such/file", "x.png")
    for path in ("/etc/x", "../x", "", "a\\b"):
        with pytest.raises(ValueError, match="must be relative"):
            tracker.log_text("x", path)
    with pytest.raises(ValueError, match="is none of FINISHED"):
        tracker.finish("DONE")
    tracker.finish("FAILED")
    tracker.finish("FAILED")  # again is harmless


def test_disabled_tracking_records_nothing(tracking: TrackingConfig) -> None:
    off = tracking.model_copy(update={"enabled": False})
    for tracker in (start(off), attach_tracker(off, "0" * 32), attach_tracker(tracking, None)):
        assert isinstance(tracker, NoopTracker)
        tracker.log_params({"a": 1})
        tracker.log_metrics({"a": 1}, step=0)
        tracker.log_text("a", "a")
        tracker.log_file("a", "a")
        tracker.log_input("a", "a", "a", "input")
        tracker.set_tags({"a": "a"})
        tracker.finish("FINISHED")
        assert (tracker.run_id, tracker.handle, tracker.wait_run_id(1)) == (None, None, None)
    assert not Path(tracking.journal_dir).exists()


def test_replay_names_what_is_missing(tracking: TrackingConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no journal folder"):
        replay(tmp_path / "absent", tracking.uri)
    down = unreachable(tracking)
    start(down).finish("FINISHED")
    with pytest.raises(InputError, match="does not take the journals"):
        replay(tracking.journal_dir, down.uri)
    assert len(journals(Path(tracking.journal_dir))) == 1


def test_replay_gives_way_to_another_process(tracking: TrackingConfig) -> None:
    from pipeline.tracking.journal import gate

    with gate(Path(tracking.journal_dir)), pytest.raises(InputError, match="Another process is sending"):
        replay(tracking.journal_dir, tracking.uri)


def test_long_values_are_cut_before_the_store_refuses_them(tracking: TrackingConfig) -> None:
    tracker = start(unreachable(tracking))
    tracker.log_params({"long": "x" * 10_000})
    tracker.finish("FAILED")
    (path,) = journals(Path(tracking.journal_dir))
    (values,) = [r["values"] for _, r in JournalReader(path).pending() if r and r["kind"] == "params"]
    assert len(values["long"]) == 6000


def test_relative_places_are_resolved_for_other_processes(tmp_path: Path) -> None:
    resolved = resolve_paths(TrackingConfig(), tmp_path)
    assert resolved.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolved.journal_dir == f"{tmp_path}/.latentloom/journal"
    assert resolve_paths(resolved, Path("/elsewhere")) == resolved
    assert resolve_paths(TrackingConfig(uri="http://h"), tmp_path).uri == "http://h"


def test_opening_imports_no_mlflow_on_the_callers_path() -> None:
    code = "import sys, pipeline.tracking.tracker, pipeline.tracking.config; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_config_imports_only_pydantic_and_ours() -> None:
    code = (
        "import sys, pipeline.tracking.config as c\n"
        "heavy = {'mlflow', 'ray', 'torch', 'pyarrow', 'PIL', 'numpy', 'diffusers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_journal_tracker_is_a_tracker(tracking: TrackingConfig) -> None:
    tracker = start(tracking)
    assert isinstance(tracker, JournalTracker)
    tracker.finish("KILLED")
    state = MlflowStore(tracking.uri).run_state(str(tracker.run_id))
    assert state is not None
    assert state.status == "KILLED"
