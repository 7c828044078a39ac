"""The sync_tracking job on real journals and a real sqlite store."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.tracking.config import SyncTrackingJobConfig, TrackingConfig, store_identity
from pipeline.tracking.delivery import plan_sync, run_sync
from pipeline.tracking.journal import Header, JournalWriter, files_dir
from pipeline.tracking.store import MlflowStore
from tests.tracking.fake_tracking_store import build_header


def header_of(number: int, server: str) -> Header:
    return replace(build_header(number, run_key=f"k{number}"), server=server)


def leave(tracking: TrackingConfig, number: int, *, server: str | None = None) -> Header:
    """The journal of a process that died before its store answered."""
    header = header_of(number, server or store_identity(tracking.uri))
    writer = JournalWriter(Path(tracking.journal_dir), header)
    writer.append({"kind": "metrics", "t": 1_000, "step": 1, "values": {"loss": 0.5}})
    name = writer.spool("notes.txt", b"hello")
    writer.append({"kind": "artifact", "file": name, "folder": ""})
    writer.close()
    return header


@pytest.mark.integration
def test_what_waits_is_sent_once(tracking: TrackingConfig) -> None:
    header = leave(tracking, 1)
    config = SyncTrackingJobConfig(tracking=tracking)
    planned = plan_sync(config)
    assert (planned.status, planned.counts["journals"]) == ("dry-run", 1)
    assert planned.counts["bytes"] > 100
    result = run_sync(config)
    assert (result.status, result.counts["journals_sent"]) == ("done", 1)
    (run_id,) = result.details["runs"]
    state = MlflowStore(tracking.uri).run_state(run_id)
    assert state is not None
    assert (state.status, dict(state.last_steps)) == ("KILLED", {"loss": 1})
    assert state.tags["latentloom.run_key"] == header.run_key
    again = run_sync(config)
    assert (again.status, again.details) == ("unchanged", {"runs": []})
    assert sorted(p.name for p in Path(tracking.journal_dir).iterdir()) == ["replay.lock"]


def test_what_stays_is_explained(tracking: TrackingConfig, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = leave(tracking, 1, server="https://old.example")
    living = JournalWriter(Path(tracking.journal_dir), header_of(2, store_identity(tracking.uri)))
    config = SyncTrackingJobConfig(tracking=tracking)
    assert plan_sync(config).counts == {
        "journals": 0,
        "journals_in_use": 1,
        "journals_for_other_servers": 1,
        "bytes": 0,
    }
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        result = run_sync(config)
    assert (result.status, result.counts["journals_in_use"], result.counts["journals_for_other_servers"]) == (
        "unchanged",
        1,
        1,
    )
    assert "any_server=true" in caplog.text
    assert "running processes" in caplog.text
    moved = SyncTrackingJobConfig(tracking=tracking, any_server=True)
    assert plan_sync(moved).counts["journals"] == 1
    (run_id,) = run_sync(moved).details["runs"]
    state = MlflowStore(tracking.uri).run_state(run_id)
    assert state is not None
    assert state.tags["latentloom.run_key"] == elsewhere.run_key
    living.close()
    assert not files_dir(living.path).exists()


def test_a_folder_or_store_that_is_not_there(tracking: TrackingConfig, tmp_path: Path) -> None:
    nowhere = SyncTrackingJobConfig(tracking=tracking.model_copy(update={"journal_dir": str(tmp_path / "none")}))
    for call in (run_sync, plan_sync):
        with pytest.raises(InputError, match="There is no journal folder"):
            call(nowhere)
    assert not (tmp_path / "none").exists()
    leave(tracking, 1)
    down = SyncTrackingJobConfig(tracking=tracking.model_copy(update={"uri": "http://127.0.0.1:9"}), any_server=True)
    with pytest.raises(InputError, match="nothing was lost"):
        run_sync(down)
    with pytest.raises(ConfigError, match="scheme"):
        plan_sync(SyncTrackingJobConfig(tracking=tracking.model_copy(update={"uri": "ftp://x"})))
    assert plan_sync(SyncTrackingJobConfig(tracking=tracking)).counts["journals"] == 1
