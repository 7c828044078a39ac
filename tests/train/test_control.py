"""What driver and workers tell each other through the store."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConflictError, PipelineError
from pipeline.storage.root import Root
from pipeline.train import control
from pipeline.train.control import (
    Notices,
    StopWatch,
    current_generation,
    lasting,
    listed_checkpoints,
    record_failure,
    recorded_failure,
    request_stop,
)
from tests.support.training import new_start


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.01)


def until_requested(watch: StopWatch) -> None:
    deadline = time.monotonic() + 30
    while not watch.requested():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_start_is_a_new_generation(root: Root) -> None:
    assert current_generation(root) == 0
    assert [new_start(root) for _ in range(3)] == [1, 2, 3]
    assert current_generation(root) == 3


def test_a_start_comes_after_those_of_releases_that_claimed_in_another_way(root: Root) -> None:
    root.put("control/generation-000004.json", b'{"checkpoints": []}')
    assert current_generation(root) == 4
    assert new_start(root, after=4) == 5
    assert new_start(root, after=5) == 6


def test_a_start_tells_which_checkpoints_it_began_with(root: Root) -> None:
    assert listed_checkpoints(root, new_start(root, checkpoints=["a"])) == ["a"]
    assert listed_checkpoints(root, new_start(root)) is None


def test_a_stop_is_for_its_own_generation(root: Root) -> None:
    first = new_start(root)
    request_stop(root, first)
    second = new_start(root)
    watch = StopWatch(root, second)
    time.sleep(0.1)
    assert not watch.requested()
    request_stop(root, second)
    until_requested(watch)
    watch.check_current()
    watch.close()


def test_a_superseded_start_is_told_so(root: Root) -> None:
    watch = StopWatch(root, new_start(root))
    new_start(root)
    until_requested(watch)
    with pytest.raises(ConflictError, match=r"Another run has taken over .* generation 1 is no longer the newest"):
        watch.check_current()
    watch.close()


def test_a_failure_keeps_its_kind_and_words_and_the_first_one_stays(root: Root) -> None:
    assert recorded_failure(root, 1) is None
    record_failure(root, 1, ConflictError("one", key="a.b", value=3, rule="r", next_step="n"))
    record_failure(root, 1, PipelineError("two"))
    error = recorded_failure(root, 1)
    assert isinstance(error, ConflictError)
    assert (error.what, error.key, error.value, error.rule, error.next_step) == ("one", "a.b", "3", "r", "n")


def test_a_notice_is_news_once_and_asked_for_only_so_often() -> None:
    answers = [False, True, True, False, True]
    notices = Notices(lambda: answers.pop(0), every_s=0.0)
    assert notices.due()
    assert [notices.new_notice() for _ in range(5)] == [False, True, False, False, True]
    assert not Notices(lambda: True, every_s=3600.0).due()
    assert not Notices(None, every_s=0.0).due()
    assert not Notices(None).new_notice()


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConflictError("held"), 4, "held"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2, "train.micro_batch"),
        (ValueError("Invalid beta parameter"), 1, "ValueError: Invalid beta parameter"),
        (ZeroDivisionError("integer modulo by zero"), 1, "ZeroDivisionError"),
        (RuntimeError("Connection closed by peer"), None, ""),
        (OSError("the store went away"), None, ""),
    ],
)
def test_what_would_come_again_after_a_restart_is_told_apart(error: Exception, code: int | None, told: str) -> None:
    meant = lasting(error)
    assert (meant.exit_code if meant else None) == code
    assert told in str(meant)
