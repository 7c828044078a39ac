"""A verification looks at what is new and at a rolling share of the rest; what it has checked it remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.errors import ConfigError, InputError
from pipeline.maintenance.config import VerifyJobConfig
from pipeline.maintenance.job import plan_verify, run_verify
from pipeline.result import JobResult
from pipeline.storage.root import Root
from pipeline.store.ledger.ledger import commit
from pipeline.store.ledger.rowset import RowSet
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


def config_of(root: Root, *overrides: str) -> VerifyJobConfig:
    return load_config(VerifyJobConfig, [], [f"data.uri={root.uri}", "tracking.enabled=false", *overrides])


def checked(root: Root, *overrides: str) -> JobResult:
    return run_verify(config_of(root, *overrides))


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


def test_what_a_part_has_not_looked_at_stays_new(root: Root) -> None:
    """A run that leaves out what is new, or half of it, does not say that it was verified."""
    everything = FILES + FILES // 2
    assert checked(root, "since=2999-01-01").counts["files_checked"] == 0
    assert 0 < checked(root, "share=0.5").counts["files_checked"] < everything
    planned = plan_verify(config_of(root, "since=last")).counts
    assert (planned["files_to_check"], planned["files"]) == (everything, FILES)
    assert planned["bytes"] > plan_verify(config_of(root, "share=0.2")).counts["bytes"] > 0
    assert checked(root, "since=last").counts["files_checked"] == everything
    assert plan_verify(config_of(root, "since=last")).counts["files_to_check"] == 0


def test_a_share_proves_that_its_rows_are_those_committed(root: Root) -> None:
    """A record that tells a row which is not in its file is found by whoever looks at that file."""
    generation = claim(root)
    sound = committer(root, generation).commit(latent_rows([(1, 1)]), None, {})
    assert sound is not None
    commit(root, replace(sound, covered=sound.covered | RowSet.from_triples([(3, 1, 2)])))
    root.delete(sound.name)
    generation.close({"status": "done"})
    problems = verify(root.uri, "checksums", portion=Portion(2, 0.0, 0.0)).problems
    assert [(p["kind"], p["detail"]) for p in problems] == [("lost", "1 committed rows are in no file")]
    assert verify(root.uri, "checksums", portion=Portion(3, 0.0, 0.0)).problems == []
