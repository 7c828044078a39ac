"""When no process of a stage can start, and when some only cannot: what the monitor says of it."""

from __future__ import annotations

from pipeline.errors import ConfigError, StoppedError
from tests.support.monitor import LocalMonitor

ENCODER = 0, "encoder"


def test_as_long_as_one_loads_or_has_started_the_others_failures_end_nothing() -> None:
    state = LocalMonitor(encoder=4).state
    for process in ("good", "slow"):
        state.loading(ENCODER, process)
    for attempt in range(50):  # of two devices that are broken, again and again
        state.loading(ENCODER, f"bad-{attempt}")
        state.cannot_start(ENCODER, f"bad-{attempt}", ConfigError("does not fit"))
    assert state.totals() == ({}, None)
    state.started(ENCODER, "good")
    assert state.totals() == ({}, None)


def test_when_each_has_failed_and_one_again_it_is_over() -> None:
    state = LocalMonitor(encoder=2).state
    for attempt in range(3):
        assert state.totals() == ({}, None)
        state.loading(ENCODER, f"{attempt}")
        state.cannot_start(ENCODER, f"{attempt}", ConfigError(f"attempt {attempt}"))
    told = state.totals()[1]
    assert isinstance(told, ConfigError)
    assert told.what == "attempt 2"
    state.ended(0)
    state.expect(1, {"encoder": 2}, units=1)  # another execution, another try
    assert state.totals() == ({}, None)


def test_an_execution_is_at_its_tail_once_a_stage_has_begun_on_all_units() -> None:
    state = LocalMonitor().state
    state.expect(1, {"denoiser": 1, "decoder": 1}, units=2)
    state.expect(2, {"denoiser": 1, "decoder": 1}, units=1)
    for number, unit in enumerate((4, 4, 5)):
        assert state.tails() == []
        state.begin((1, "denoiser"), "p", number, [(unit, 0, 3)])
    state.begin((1, "decoder"), "q", 0, [(4, 0, 3)])
    state.begin((9, "decoder"), "q", 0, [(4, 0, 3)])  # of one that is over
    assert state.tails() == [1]
    state.ended(1)
    assert state.tails() == []


def test_processes_that_die_while_they_load_and_say_nothing_do_not_go_on_for_ever() -> None:
    state = LocalMonitor(encoder=1).state
    for attempt in range(5):
        state.loading(ENCODER, f"{attempt}")
        assert state.totals() == ({}, None)
    state.loading(ENCODER, "5")
    told = state.totals()[1]
    assert isinstance(told, StoppedError)
    assert "died 5 times while they loaded" in told.what
