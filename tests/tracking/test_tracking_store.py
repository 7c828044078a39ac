"""What `MlflowStore` promises, on sqlite."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.delivery import mlflow_ui_command
from pipeline.tracking.journal import Header
from pipeline.tracking.store import NOTE_TAG, MlflowStore, Point, RunMissing, StoreRefused, TrackingUnavailable
from pipeline.tracking.tracker import environment_tags, git_commit, installed_packages

Build = Callable[..., Header]


def test_many_makers_of_one_experiment_agree(tracking: TrackingConfig, header: Build) -> None:
    barrier, ids = threading.Barrier(4), []

    def make(number: int) -> None:
        store = MlflowStore(tracking.uri)
        barrier.wait()
        run = store.create_run(replace(header(number, run_key=f"k{number}"), experiment="contested"))
        ids.append(store.client.get_run(run.run_id).info.experiment_id)

    threads = [threading.Thread(target=make, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4
    assert len(set(ids)) == 1


def test_repeating_a_call_changes_nothing(tracking: TrackingConfig, header: Build) -> None:
    store = MlflowStore(tracking.uri)
    run_id = store.create_run(header()).run_id
    for _ in range(3):
        points = [Point("loss", float("nan"), 5, 1), Point("loss", 2.0, 6, 2)]
        store.log_batch(run_id, points, {"p": "1"}, {"t": "1"})
        store.log_input(run_id, "n", "d" * 64, "s3://b/x", "input", {"latentloom.weight": "2"})
    assert len(store.client.get_metric_history(run_id, "loss")) == 2
    state = store.run_state(run_id)
    assert state is not None
    assert (len(state.datasets), state.last_steps, state.params) == (1, {"loss": 2}, {"p": "1"})
    assert state.datasets[0].digest == "d" * 64
    (used,) = store.client.get_run(run_id).inputs.dataset_inputs
    assert {tag.key: tag.value for tag in used.tags}["latentloom.weight"] == "2"


def test_errors_come_out_as_refused_missing_or_unavailable(tracking: TrackingConfig, header: Build) -> None:
    store = MlflowStore(tracking.uri)
    run_id = store.create_run(header()).run_id
    with pytest.raises(StoreRefused, match="loss!"):
        store.log_batch(run_id, [Point("loss!", 1.0, 1, 1)], {}, {})
    store.log_batch(run_id, [], {"p": "1"}, {})
    with pytest.raises(StoreRefused, match="p"):
        store.log_batch(run_id, [], {"p": "2"}, {})
    with pytest.raises(RunMissing):
        store.log_batch("0" * 32, [Point("loss", 1.0, 1, 1)], {}, {})
    with pytest.raises(TrackingUnavailable):
        MlflowStore("http://127.0.0.1:9").run_state(run_id)


def test_a_deleted_run_is_none_and_a_deleted_experiment_says_what_to_do(
    tracking: TrackingConfig, header: Build
) -> None:
    store = MlflowStore(tracking.uri)
    run_id = store.create_run(header()).run_id
    store.client.delete_run(run_id)
    assert store.run_state(run_id) is None
    assert store.find_run(header(), run_id) is None
    assert store.run_state("no id at all!") is None
    store.client.delete_experiment(store.client.get_experiment_by_name("latentloom").experiment_id)
    with pytest.raises(TrackingUnavailable, match="was deleted: restore it"):
        MlflowStore(tracking.uri).create_run(header())


def test_a_servers_password_goes_to_the_environment_and_not_into_errors() -> None:
    import os

    store = MlflowStore("http://me:planted%2DSecret@127.0.0.1:9")
    with pytest.raises(TrackingUnavailable) as caught:
        store.run_state("0" * 32)
    assert "planted" not in str(caught.value)
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "planted-Secret"


def test_the_ui_command_can_be_run_as_it_is(tracking: TrackingConfig) -> None:
    words = shlex.split(mlflow_ui_command(tracking.uri))
    assert words[0] == "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    assert words[1:5] == [sys.executable, "-m", "mlflow", "ui"]
    assert words[words.index("--backend-store-uri") + 1] == tracking.uri
    assert mlflow_ui_command("http://u:secret@h:5000").endswith("-m webbrowser http://h:5000")
    assert "secret" not in mlflow_ui_command("postgresql://u:secret@h/db")


def test_environment_names_code_and_packages_and_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "planted-Secret-77")
    tags, packages = environment_tags(), installed_packages().splitlines()
    assert not [name for name in tags if "package" in name]
    assert f"pydantic=={importlib.metadata.version('pydantic')}" in packages
    assert packages == sorted(packages, key=lambda line: line.partition("==")[0].lower())
    assert len({line.partition("==")[0].lower() for line in packages}) == len(packages)
    assert "planted-Secret-77" not in repr((tags, packages))


def test_a_description_leads_to_the_runs_it_names(tracking: TrackingConfig, header: Build) -> None:
    store = MlflowStore(tracking.uri)
    made = store.create_run(header(1, run_key="k1"))
    other = store.create_run(header(2, run_key="k2"))
    note = f"by [fit_codec](run:{made.run_id}), [gone](run:{'0' * 32}), [early](run:key:{'1' * 32}), [x](s3://y)"
    store.log_batch(other.run_id, [], {}, {NOTE_TAG: note, "plain": note})
    tags = store.client.get_run(other.run_id).data.tags
    experiment = store.client.get_run(made.run_id).info.experiment_id
    assert tags[NOTE_TAG] == (
        f"by [fit_codec](#/experiments/{experiment}/runs/{made.run_id}), gone, early, [x](s3://y)"
    )
    assert tags["plain"] == note


def test_the_commit_is_that_of_the_repository_that_tracks_the_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package, installed = tmp_path / "package", tmp_path / "site-packages"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    assert git_commit(package) is None
    git("init", "-q")
    git("add", "package")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(package) == commit
    assert git_commit(installed) is None
    (package / "__init__.py").write_text("changed = 1\n")
    assert git_commit(package) == f"{commit}-dirty"
