"""A cluster that grows on demand: what is asked of an autoscaler, and what happens when it does not come."""

from __future__ import annotations

import pytest

from pipeline.dataflow.cluster import await_resources
from pipeline.errors import StoppedError

pytestmark = pytest.mark.integration


def test_waits_until_everything_is_there() -> None:
    steps = iter([{}, {"CPU": 2.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}])
    await_resources({"CPU": 8, "GPU": 2}, lambda: next(steps), timeout_s=10.0)
    assert next(steps, None) is None


def test_goes_on_with_a_part(caplog: pytest.LogCaptureFixture) -> None:
    await_resources({"CPU": 8, "GPU": 4}, lambda: {"CPU": 8.0, "GPU": 3.0}, timeout_s=0.01)
    assert "3 of 4 GPUs" in caplog.text


def test_stops_resumably_when_nothing_came() -> None:
    with pytest.raises(StoppedError, match="0 of 4 GPUs") as caught:
        await_resources({"CPU": 8, "GPU": 4}, lambda: {"CPU": 8.0}, timeout_s=0.01)
    assert caught.value.exit_code == 75
    assert caught.value.key == "cluster.request_timeout_s"
