#!/usr/bin/env python3
"""Write what Ray logs into its session's files to stdout, one JSON object a line: {"file": ..., "line": ...}.

Ray's processes and the jobs' own stdout and stderr log to files that go with the pod. Run as a sidecar, whose stdout
is what a cluster's log collector keeps. Argument: Ray's folder. It reads files and needs no rights; ended by SIGTERM,
it writes the rest first. A new start begins with the files' first lines again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

PERIOD_S = 1.0
# What is read of a file at once, and the longest line: memory does not grow with the logs.
BLOCK = 1 << 18
SUFFIXES = (".log", ".out", ".err")


class Follower:
    """Every line of every log once, also when files are rotated: known by what they are, not by their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[int, int] = {}

    def lines(self, last: bool) -> Iterator[tuple[str, str]]:
        """(file, line) of what is new, at most a block of each file; at the last look unfinished lines, too."""
        offsets = {}
        for path in self._files():
            try:
                with path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    offset = self._offsets.get(stat.st_ino, 0)
                    offset = offset if offset <= stat.st_size else 0  # another file in the place of one that went
                    file.seek(offset)
                    block = file.read(BLOCK)
            except OSError:  # it went between two looks
                continue
            end = block.rfind(b"\n") + 1
            if (last and len(block) < BLOCK) or (not end and len(block) == BLOCK):
                end = len(block)
            offsets[stat.st_ino] = offset + end
            for line in block[:end].splitlines():
                yield str(path.relative_to(self._folder)), line.decode(errors="replace")
        self._offsets = offsets

    def _files(self) -> list[Path]:
        # session_latest is a link to one of the others.
        sessions = [p for p in self._folder.glob("session_*") if not p.is_symlink()]
        found = (p for s in sessions for p in (s / "logs").rglob("*"))
        # raylet.out.1 is a raylet.out that was rotated.
        return sorted(p for p in found if {*SUFFIXES} & {*p.suffixes} and p.is_file() and not p.is_symlink())


def main() -> int:
    """Until SIGTERM."""
    follower = Follower(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/ray"))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while True:
        last, count = stop.is_set(), 0
        for file, line in follower.lines(last):
            sys.stdout.write(json.dumps({"file": file, "line": line}) + "\n")
            count += 1
        sys.stdout.flush()
        if last and not count:
            return 0
        if not last:
            stop.wait(PERIOD_S)


if __name__ == "__main__":
    sys.exit(main())
