"""The progress line: honest rate and ETA, few lines without a terminal, one rewritten line on one."""

import io
import itertools
import json

import pytest

from pipeline.progress import Progress


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_rate_and_eta_come_from_this_run_only(clock: FakeClock) -> None:
    out = io.StringIO()
    progress = Progress("encode", 1_000, start=600, stream=out, clock=clock)
    progress.update(600)
    clock.now_s += 90  # until the first news nothing has begun
    progress.update(600)
    progress.update(700)
    clock.now_s += 10
    progress.update(750)
    clock.now_s += 10
    progress.update(900)
    assert out.getvalue().splitlines()[-1] == "encode  900/1,000 images 90%  10 images/s  eta 0:10"


def test_starting_up_is_no_part_of_the_running_rate_but_of_the_final_one(clock: FakeClock) -> None:
    out = io.StringIO()
    progress = Progress("encode", 300, stream=out, clock=clock)
    clock.now_s += 90
    progress.update(50)
    clock.now_s += 10
    progress.update(250)
    progress.close()
    first, second, last = out.getvalue().splitlines()
    assert "eta unknown" in first
    assert "20 images/s  eta 0:02" in second
    assert "in 1:40  2.5 images/s" in last


def test_eta_is_unknown_until_something_moved(clock: FakeClock) -> None:
    out = io.StringIO()
    progress = Progress("encode", 1_000, start=600, stream=out, clock=clock)
    clock.now_s += 5
    progress.update(600)
    assert "eta unknown" in out.getvalue()
    assert "- images/s" in out.getvalue()


def test_no_total_means_no_eta_and_no_share(clock: FakeClock) -> None:
    out = io.StringIO()
    progress = Progress("list", None, "files", stream=out, clock=clock)
    progress.update(0)
    progress.update(10_000)
    clock.now_s += 20
    progress.update(60_000)
    assert out.getvalue().splitlines()[-1] == "list  60,000 files  2,500 files/s"


def test_without_a_terminal_intervals_grow_and_stay_bounded(clock: FakeClock) -> None:
    out = io.StringIO()
    progress = Progress("train", 3_600, stream=out, clock=clock)
    for second in range(3_600):
        clock.now_s += 1
        progress.update(second)
    lines = out.getvalue().splitlines()
    seen = [int(line.split()[1].split("/")[0].replace(",", "")) for line in lines]
    gaps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert gaps[0] == 10
    assert gaps == sorted(gaps)
    assert max(gaps) == 30
    assert "\r" not in out.getvalue()


def test_machines_are_told_in_json(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTLOOM_LOG", "json")
    out = Terminal()  # who asks for it means it on a terminal, too
    with Progress("encode", 100, stream=out, clock=clock) as progress:
        progress.update(40, rejected=2)
    first, last = map(json.loads, out.getvalue().splitlines())
    told = {"progress": "encode", "done": 40, "total": 100, "unit": "images", "rejected": 2}
    assert first.items() >= told.items()
    assert last.items() >= told.items()
    assert first["message"].startswith("encode  40/100 images 40%")


def test_terminal_rewrites_one_line_within_its_width(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    progress = Progress("sample", 10, stream=out, clock=clock)
    for done in range(10):
        clock.now_s += 0.05
        progress.update(done, note="a figure that is much too long for this terminal")
    frames = out.getvalue().split("\r")[1:]
    assert len(frames) == 5
    assert all(len(frame.removesuffix("\x1b[K")) < 40 for frame in frames)
    assert "\n" not in out.getvalue()
    progress.close()
    assert out.getvalue().count("\n") == 1


def test_dumb_terminal_gets_plain_lines(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    Progress("sample", 10, stream=out, clock=clock).update(1)
    assert "\r" not in out.getvalue()


def test_last_line_always_comes_and_comes_once(clock: FakeClock) -> None:
    out = io.StringIO()
    with Progress("encode", 100, stream=out, clock=clock) as progress:
        progress.update(0, rejected=0)
        clock.now_s += 4
        progress.update(100, rejected=3)
    progress.close()
    progress.update(100)
    assert out.getvalue().splitlines()[1:] == ["encode  100/100 images 100%  in 0:04  25 images/s  rejected 3"]


def test_last_line_says_when_the_work_was_cut_short(clock: FakeClock) -> None:
    out = io.StringIO()
    progress = Progress("train", 100, "steps", stream=out, clock=clock)
    clock.now_s += 100_000
    progress.update(40, loss=0.123456)
    progress.close()
    assert out.getvalue().splitlines()[-1].startswith("train  stopped at 40/100 steps 40%  in 1d 3:46:40")
    assert "loss 0.123" in out.getvalue()


def test_nothing_to_do_is_complete(clock: FakeClock) -> None:
    out = io.StringIO()
    Progress("encode", 0, stream=out, clock=clock).close()
    assert out.getvalue() == "encode  0/0 images 100%  in 0:00\n"


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), 1e-9, 123_456.7, "busy"])
def test_any_figure_can_be_shown(clock: FakeClock, figure: float | str) -> None:
    out = io.StringIO()
    Progress("train", None, stream=out, clock=clock).update(1, loss=figure)
    assert "loss " in out.getvalue()


def test_closed_stream_does_not_stop_the_work(clock: FakeClock) -> None:
    out = io.StringIO()
    progress = Progress("encode", 10, stream=out, clock=clock)
    out.close()
    progress.update(1)
    progress.close()


def test_default_stream_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("encode", 1).close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("encode")
