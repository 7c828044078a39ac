"""Rates from a clock that the test holds."""

from __future__ import annotations

import pytest

from pipeline.train import loop as meter
from pipeline.train.loop import Meter, peak_flops


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meter.time, "perf_counter", clock)
    return clock


def test_rates_leave_out_pauses_and_start_anew_at_each_reading(clock: Clock) -> None:
    m = Meter(flops_per_image=3e9, peak=1e12)
    with m.waiting():
        clock.now += 1
    clock.now += 3
    m.step(100)
    with m.paused():
        clock.now += 50
    figures = m.figures()
    assert figures["images_per_s"] == pytest.approx(25)
    assert figures["data_wait_share"] == pytest.approx(0.25)
    assert figures["mfu"] == pytest.approx(25 * 3e9 / 1e12)
    clock.now += 2
    m.step(10)
    assert m.figures()["images_per_s"] == pytest.approx(5)


def test_mfu_is_absent_where_the_peak_is_unknown(clock: Clock) -> None:
    assert peak_flops("Some CPU") is None
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    clock.now += 1
    assert "mfu" not in Meter().figures()
