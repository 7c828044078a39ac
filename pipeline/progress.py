"""Progress of a long step as one line on standard error: how far, how fast, how much longer.

On a terminal the line is rewritten in place; into a file or a pipe a line is printed now and then, at growing
intervals, so that a run of days leaves a log of thousands of lines and not of millions. LATENTLOOM_LOG=json makes it,
and every other message of a job on standard error, one JSON object a line.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

TERMINAL_INTERVAL_S = 0.1
FIRST_LOG_INTERVAL_S = 10.0
LAST_LOG_INTERVAL_S = 30.0
LOG_INTERVAL_GROWTH = 1.25

Figure = int | float | str


def as_json() -> bool:
    """Whether messages are to be read by machines: LATENTLOOM_LOG=json."""
    return os.environ.get("LATENTLOOM_LOG") == "json"


class Progress:
    """Shows `done` of `total` units, the rate of this run, the time left and any extra figures.

    `start` is what earlier runs already finished: it counts as done but not towards the rate. Methods may be
    called from several threads. A stream that can no longer be written to silences the display, not the job.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str = "images",
        *,
        start: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._start = self._done = start
        self._figures: dict[str, Figure] = {}
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._began_s = clock()
        self._first: tuple[float, int] | None = None  # when the first news came, and what was done by then
        self._next_s = self._began_s
        self._json = as_json()
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb" and not self._json
        self._interval_s = TERMINAL_INTERVAL_S if self._terminal else FIRST_LOG_INTERVAL_S
        self._closed = self._mute = False
        self._lock = threading.Lock()

    def update(self, done: int, **figures: Figure) -> None:
        """Set how many units are done, earlier runs' included; `figures` stay until replaced."""
        with self._lock:
            self._done = done
            self._figures.update(figures)
            now_s = self._clock()
            if done > self._start:
                self._first = self._first or (now_s, done)
            if self._closed or now_s < self._next_s:
                return
            self._next_s = now_s + self._interval_s
            if self._terminal:
                width = max(shutil.get_terminal_size().columns - 1, 20)
                self._write(f"\r{self._running_line(now_s)[:width]}\x1b[K")
            else:
                self._interval_s = min(self._interval_s * LOG_INTERVAL_GROWTH, LAST_LOG_INTERVAL_S)
                self._write(self._running_line(now_s) + "\n")

    def close(self) -> None:
        """Print the last line: what was done, in how long, at which mean rate. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            complete = self._total is None or self._done >= self._total
            elapsed_s, moved = self._clock() - self._began_s, self._done - self._start
            parts = [self._name, self._counted() if complete else f"stopped at {self._counted()}"]
            parts.append(f"in {_duration(elapsed_s)}")
            if elapsed_s > 0 and moved > 0:
                parts.append(f"{_number(moved / elapsed_s)} {self._unit}/s")
            line = "  ".join([*parts, *self._extras()])
            self._write(f"\r{line}\x1b[K\n" if self._terminal else f"{line}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running_line(self, now_s: float) -> str:
        # Since the first news, so that starting up is no part of it.
        since_s, before = self._first or (now_s, self._done)
        elapsed_s, moved = now_s - since_s, self._done - before
        rate = moved / elapsed_s if elapsed_s > 0 and moved > 0 else None
        parts = [self._name, self._counted()]
        parts.append(f"{_number(rate)} {self._unit}/s" if rate else f"- {self._unit}/s")
        if self._total is not None:
            left = max(self._total - self._done, 0)
            parts.append(f"eta {_duration(left / rate)}" if rate else "eta unknown")
        return "  ".join([*parts, *self._extras()])

    def _counted(self) -> str:
        if self._total is None:
            return f"{self._done:,} {self._unit}"
        share = 100 * self._done // self._total if self._total else 100
        return f"{self._done:,}/{self._total:,} {self._unit} {share}%"

    def _extras(self) -> list[str]:
        return [f"{name} {_number(value)}" for name, value in self._figures.items()]

    def _write(self, text: str) -> None:
        if self._mute:
            return
        if self._json:
            counts = {"progress": self._name, "done": self._done, "total": self._total, "unit": self._unit}
            text = json.dumps({"time": time.time(), **counts, **self._figures, "message": text.strip()}) + "\n"
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a closed pipe or file: nobody looks any more, the work goes on
            self._mute = True


def _number(value: Figure) -> str:
    """A figure at the precision a person reads: 1,234 or 12.3 or 0.0456."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 100 and abs(value) != float("inf")):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    """h:mm:ss from an hour on, m:ss below, days in front beyond a day."""
    whole = round(seconds)
    days, rest = divmod(whole, 86_400)
    hours, rest = divmod(rest, 3_600)
    minutes, secs = divmod(rest, 60)
    clock = f"{hours}:{minutes:02d}:{secs:02d}" if hours or days else f"{minutes}:{secs:02d}"
    return f"{days}d {clock}" if days else clock
