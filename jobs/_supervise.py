"""A job in a process of its own, so that even a death without a word has an exit code and a last line.

The kernel kills what takes too much memory; Ray ends its driver by `_exit(1)` when the node's object store goes.
No handler inside the process sees either. So the command's first process only waits, passes signals on, and says
what became of the second one, which does the work.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from types import FrameType
from typing import BinaryIO, NoReturn

# What a job ends with: its exit code, and the line that goes to standard output.
Ending = tuple[int, str | None]
_PR_SET_PDEATHSIG = 1


def supervised(work: Callable[[], Ending], on_death: Callable[[str], Ending]) -> Ending:
    """The ending of `work`, run in a forked process; of `on_death`, given the cause in words, when that one died.

    SIGTERM is passed on, SIGINT reaches the worker by itself (a terminal sends it to the whole group). When this
    process dies the worker is killed, too.
    """
    with tempfile.TemporaryFile() as note:
        sys.stdout.flush()
        sys.stderr.flush()
        me, worker = os.getpid(), os.fork()
        if worker == 0:
            _work(me, work, note)

        def forward(signum: int, frame: FrameType | None) -> None:
            os.kill(worker, signum)

        previous = signal.signal(signal.SIGTERM, forward), signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            status = os.waitpid(worker, 0)[1]
        finally:
            signal.signal(signal.SIGTERM, previous[0])
            signal.signal(signal.SIGINT, previous[1])
        note.seek(0)
        ending = note.read()
    if ending:
        code, line = json.loads(ending)
        return code, line
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return on_death(f"it was killed by {signal.Signals(-code).name}")
    return on_death(f"it ended with status {code} and said nothing")


def _work(parent: int, work: Callable[[], Ending], note: BinaryIO) -> NoReturn:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be watched
            os._exit(1)
    code, line = work()
    note.write(json.dumps([code, line]).encode())
    note.flush()
    sys.exit(code)
