"""Private memory of a job's processes over time, by what each of them is."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Mapping, Sequence

import psutil

RAY_ROLES = {"MonitorState": "monitor", "/raylet ": "raylet", "gcs_server": "gcs"}


class MemoryWatch:
    """Samples, every few seconds, the private memory (resident less shared) of a process and of its descendants."""

    def __init__(self, roles: Mapping[str, str], pid: int | None = None, every_s: float = 2.0) -> None:
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._roles, self._pid, self._every_s = {**roles, **RAY_ROLES}, pid, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def roles(self) -> list[str]:
        """Every role that was seen."""
        return sorted({role for _, found in self.samples for role in found})

    def peak_mib(self) -> dict[str, float]:
        """The most of each role's largest process."""
        return {role: max(self._of(role)) for role in self.roles}

    def growth_mib(self) -> dict[str, float | None]:
        """Median of the last quarter of the samples less that of the quarter before it; None where there are few."""
        return {role: _growth(self._of(role)) for role in self.roles}

    def _of(self, role: str) -> list[float]:
        return [found[role] for _, found in self.samples if role in found]

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.samples.append((time.monotonic() - self._began, self._by_role()))

    def _by_role(self) -> dict[str, float]:
        """MiB of the largest process in each role."""
        try:
            driver = psutil.Process(self._pid)
            found = {"driver": _private_mib(driver)}
            children = driver.children(recursive=True)
        except psutil.Error:
            return {}  # it has ended
        for child in children:
            try:
                line = " ".join(child.cmdline())
                role = next((role for part, role in self._roles.items() if part in line), None)
                if role:
                    found[role] = max(found.get(role, 0.0), _private_mib(child))
            except psutil.Error:
                continue  # it ended while we looked
        return found


def _private_mib(process: psutil.Process) -> float:
    info = process.memory_info()
    return float(info.rss - info.shared) / 2**20


def _growth(values: Sequence[float]) -> float | None:
    if len(values) < 8:
        return None
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[-2 * quarter : -quarter])
