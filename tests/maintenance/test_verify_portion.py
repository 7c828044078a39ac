"""A verification looks at what is new and at a rolling share of the rest; what it has checked it remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError
from pipeline.maintenance.config import VerifyJobConfig
from pipeline.maintenance.job import run_verify
from pipeline.result import JobResult
from pipeline.storage.root import Root
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.verify import Portion, verify
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows

FILES = 24  # of data, and a reject file beside each second one


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = planned_root(str(tmp_path / "data"), units=FILES, rows=2)
    for units in (range(20), range(20, FILES)):
        generation = claim(root)
        for unit in units:
            rejects = rejected_rows([(unit, 1)], "truncated") if unit % 2 else None
            rows = [(unit, 0)] if unit % 2 else [(unit, 0), (unit, 1)]
            committer(root, generation).commit(latent_rows(rows), rejects, {})
        generation.close({"status": "done"})
    return root


def checked(root: Root, *overrides: str) -> JobResult:
    fixed = [f"data.uri={root.uri}", "tracking.enabled=false"]
    return run_verify(load_config(VerifyJobConfig, [], [*fixed, *overrides]))


def damage(root: Root, path: str) -> None:
    data = bytearray(root.read_bytes(path))
    data[10] ^= 1
    root.put(path, bytes(data))


def test_shares_in_turn_go_through_all_files_once(root: Root) -> None:
    state = read_state(root)
    seen: list[str] = []
    portion = Portion(share=0.25)
    for _ in range(4):
        seen += [state.files[at].info.path for at in portion.of(state.files)]
        report = verify(root.uri, "checksums", portion=portion)
        assert (report.problems, report.files) == ([], FILES + FILES // 2)
        portion = Portion(begin=portion.end, share=0.25)
    assert sorted(seen) == sorted(file.info.path for file in state.files)
    assert len(Portion().of(state.files)) == FILES


def test_runs_go_on_where_the_last_one_that_found_nothing_ended(root: Root) -> None:
    counts = [checked(root, "share=0.5").counts["files_checked"] for _ in range(2)]
    assert sum(counts) == FILES + FILES // 2
    assert min(counts) > 5
    victim = read_state(root).files[7].info.path
    damage(root, victim)
    answers = [outcome(root, "share=0.5") for _ in range(4)]
    # A run that finds something is made again: it does not go on without it.
    assert [victim in answer for answer in answers][-3:] == [True] * 3


def outcome(root: Root, *overrides: str) -> str:
    """What a verification says is wrong; nothing where nothing is."""
    try:
        checked(root, *overrides)
    except InputError as error:
        return str(error)
    return ""


def test_since_the_last_time_only_what_is_new_is_looked_at(root: Root) -> None:
    assert checked(root, "since=last").counts["files_checked"] == FILES + FILES // 2, "nothing was verified before"
    assert checked(root, "since=last").counts["files_checked"] == 0
    damage(root, read_state(root).files[0].info.path)  # an old one, which somebody else looks at
    generation = claim(root)
    committer(root, generation).commit(latent_rows([(1, 1)]), None, {})
    # While its run goes on more may come.
    assert checked(root, "since=last").counts["files_checked"] == 1
    committer(root, generation).commit(latent_rows([(3, 1)]), None, {})
    generation.close({"status": "done"})
    assert checked(root, "since=last").counts["files_checked"] == 2
    assert checked(root, "since=last").counts["files_checked"] == 0
    assert checked(root, "since=last", "level=files").counts["files_checked"] > FILES, "each level for itself"
    with pytest.raises(InputError, match="is not sound"):
        checked(root)


def test_since_a_day(root: Root) -> None:
    assert checked(root, "since=2020-01-01").counts["files_checked"] == FILES + FILES // 2
    assert checked(root, "since=2999-01-01").counts["files_checked"] == 0
    with pytest.raises(ConfigError, match="since"):
        checked(root, "since=yesterday")


def test_a_share_proves_that_its_rows_are_those_committed(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files that were exchanged for each other, with their names, the ledger knows other rows."""
    state = read_state(root)
    first, second = state.files[0].info, state.files[2].info
    one, other = root.read_bytes(first.path), root.read_bytes(second.path)
    root.put(first.path, other)
    root.put(second.path, one)
    kinds = {p["kind"] for p in verify(root.uri, "checksums", portion=Portion(0, 0.0, 0.0)).problems}
    assert kinds & {"size", "checksum"}
