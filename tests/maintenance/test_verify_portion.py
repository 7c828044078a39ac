"""A verification looks at what is new and at a rolling share of the rest; what it has checked it remembers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
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
from pipeline.store.maintain import verify as module
from pipeline.store.maintain.verify import Portion, Sweep, verify
from tests.support.jobs import run, start
from tests.support.kills import victims
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows
from tests.support.site import site_environment

FILES = 24  # of data, and a reject file beside each second one
ALL = FILES + FILES // 2


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


# -- One that is killed goes on --------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write an item, and a note after each."""
    monkeypatch.setattr(module, "_ITEM_FILES", 1)
    monkeypatch.setattr(module, "_NOTE_S", 0.0)


def killed_after(items: int) -> Any:
    """One after the other in an order of chance, until so many are done."""

    def spread(make: Callable[[], Callable[[Any], Any]], work: Iterable[Any]) -> Iterator[Any]:
        check = make()
        # Some come early, as with several workers.
        for done, item in enumerate(sorted(work, key=lambda item: item[0] // 4 * 4 - item[0] % 4)):
            if done == items:
                raise Killed
            yield check(item)

    return spread


@pytest.mark.parametrize("portion", [Portion(), Portion(begin=0.7), Portion(1, 0.3, 0.4), Portion(share=0.6)])
def test_wherever_a_verification_is_killed_every_damage_is_found_and_less_is_left(
    root: Root, often: None, portion: Portion
) -> None:
    state = read_state(root)
    victims = [state.files[at].info.path for at in portion.of(state.files)][2::5]
    for path in victims:
        damage(root, path)
    whole = verify(root.uri, "checksums", portion=portion)
    assert sorted(p["where"] for p in whole.problems) == sorted(victims)
    for items in (0, 1, 3, 5, 6, 8):
        notes: list[Sweep] = []
        with pytest.raises(Killed):
            verify(root.uri, "checksums", portion=portion, note=notes.append, spread=killed_after(items))
        relied = notes[-1] if notes else None
        left = verify(root.uri, "checksums", portion=portion, relied=relied, note=notes.append)
        assert sorted(p["where"] for p in left.problems) == sorted(victims)
        assert left.files_checked + left.files_relied_on == whole.files_checked
        assert left.digest == whole.digest
        # All is told by the last note: what was found damaged is looked at once more, and nothing else.
        assert notes[-1].damaged == frozenset(victims)
        again = verify(root.uri, "checksums", portion=portion, relied=notes[-1])
        assert sorted(p["where"] for p in again.problems) == sorted(victims)
        assert len(victims) <= again.files_checked <= 2 * len(victims)
    assert verify(root.uri, "checksums", portion=Portion(begin=0.1), relied=notes[-1]).files_relied_on == 0


def test_what_came_after_a_killed_verification_is_looked_at(root: Root, often: None) -> None:
    notes: list[Sweep] = []
    with pytest.raises(Killed):
        verify(root.uri, "checksums", note=notes.append, spread=killed_after(20))
    generation = claim(root)
    for unit in (1, 3, 5, 7, 9):
        committer(root, generation).commit(latent_rows([(unit, 1)]), None, {})
    state = read_state(root)
    fresh = [file.info.path for file in state.files if file.record.generation == generation.number]
    for path in fresh:
        damage(root, path)
    for _ in range(2):  # while its run goes on, too
        report = verify(root.uri, "checksums", relied=notes[-1], note=notes.append)
        assert sorted(p["where"] for p in report.problems) == sorted(fresh)
        assert report.files_relied_on > 0
    generation.close({"status": "done"})


def test_a_job_goes_on_within_its_sweep_and_begins_anew_after_it(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = read_state(root).files[7].info.path
    damage(root, victim)
    assert victim in outcome(root)
    counts = plan_verify(config_of(root)).counts
    assert (counts["files_to_check"], counts["files_relied_on"]) == (2, ALL - 2)
    assert victim in outcome(root)
    assert plan_verify(config_of(root, "resume_s=0")).counts["files_to_check"] == ALL
    assert plan_verify(config_of(root, "share=0.5")).counts["files_relied_on"] == 0, "another portion"
    assert plan_verify(config_of(root, "level=files")).counts["files_relied_on"] == 0, "another level"
    damage(root, victim)  # the same bit again: it is whole
    answer = checked(root)
    assert (answer.counts["files_checked"], answer.counts["files_relied_on"]) == (2, ALL - 2)
    assert answer.details["relied_on_since"].startswith("20")
    answer = checked(root)
    assert (answer.counts["files_checked"], answer.counts["files_relied_on"]) == (ALL, 0)
    assert answer.details == {}


def test_a_sweep_too_old_is_not_relied_on(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = read_state(root).files[3].info.path
    damage(root, victim)
    assert victim in outcome(root)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 8 * 86_400)
    assert plan_verify(config_of(root)).counts["files_relied_on"] == 0


SLOW = """
    import time
    import pipeline.store.maintain.verify as verify
    verify._ITEM_FILES, verify._NOTE_S = 1, 0.0
    real = verify._check_file
    def check_file(*arguments):
        time.sleep(0.1)
        return real(*arguments)
    verify._check_file = check_file
"""


@pytest.mark.integration
def test_a_command_that_is_killed_goes_on(root: Root, tmp_path: Path) -> None:
    """SIGKILL: what it had noted is not looked at again, the rest is, and damage in either is found."""
    arguments = [f"data.uri={root.uri}", "tracking.enabled=false", "workers=2"]
    for victim in [file.info.path for file in read_state(root).files][::6]:
        damage(root, victim)
    slow = site_environment(tmp_path / "site", SLOW)
    process = start("verify", *arguments, cwd=tmp_path, env=slow)
    note = Path(str(root.local_path("verified/checksums.json")))
    until = time.monotonic() + 60
    while time.monotonic() < until and (not note.exists() or json.loads(note.read_bytes())["sweep"]["reached"] < 0.3):
        time.sleep(0.02)
    (driver,) = victims(psutil.Process(process.pid), "driver")
    os.kill(driver.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 75
    code, answer, errors = run("verify", *arguments, cwd=tmp_path)
    assert code == 3, errors
    assert "going on with a verification of 20" in errors
    assert answer["counts"]["problems"] == 4
    assert 5 < answer["counts"]["files_relied_on"] < ALL
    assert answer["counts"]["files_checked"] == ALL - answer["counts"]["files_relied_on"]
