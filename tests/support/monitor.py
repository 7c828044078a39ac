"""The monitor of a job in this process, for tests of stages and passes without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipeline.dataflow.monitor import MonitorState


class _Quiet(MonitorState):
    """Totals alone: metrics need a cluster."""

    def add(self, amounts: Any) -> None:
        for name, amount in amounts.items():
            self._done[name] = self._done.get(name, 0.0) + amount


class LocalMonitor:
    """`monitor.name.remote(...)` answers at once; `state` is what the actor would hold. actors: of each stage, of the
    execution 0.
    """

    def __init__(self, **actors: int) -> None:
        self.state = _Quiet("test")
        self.state.expect(0, actors, 1 << 30)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.state, name))
