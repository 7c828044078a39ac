"""When no process of a stage can start, and when some only cannot: what the monitor says of it."""

from __future__ import annotations

from pipeline.errors import ConfigError, StoppedError
from tests.support.monitor import LocalMonitor


def test_as_long_as_one_loads_or_has_started_the_others_failures_end_nothing() -> None:
    state = LocalMonitor(encoder=4).state
    for process in ("good", "slow"):
        state.loading("encoder", process)
    for attempt in range(50):  # of two devices that are broken, again and again
        state.loading("encoder", f"bad-{attempt}")
        state.cannot_start("encoder", f"bad-{attempt}", ConfigError("does not fit"))
    assert state.totals() == ({}, None)
    state.started("encoder", "good")
    assert state.totals() == ({}, None)


def test_when_each_has_failed_and_one_again_it_is_over() -> None:
    state = LocalMonitor(encoder=2).state
    for attempt in range(3):
        assert state.totals() == ({}, None)
        state.loading("encoder", f"{attempt}")
        state.cannot_start("encoder", f"{attempt}", ConfigError(f"attempt {attempt}"))
    told = state.totals()[1]
    assert isinstance(told, ConfigError)
    assert told.what == "attempt 2"
    state.expect({"encoder": 2})  # another execution, another try
    assert state.totals() == ({}, None)


def test_processes_that_die_while_they_load_and_say_nothing_do_not_go_on_for_ever() -> None:
    state = LocalMonitor(encoder=1).state
    for attempt in range(5):
        state.loading("encoder", f"{attempt}")
        assert state.totals() == ({}, None)
    state.loading("encoder", "5")
    told = state.totals()[1]
    assert isinstance(told, StoppedError)
    assert "died 5 times while they loaded" in told.what
