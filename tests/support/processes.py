"""Server processes of tests: started with a log, stopped by id, and gone when the tests' own process is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def free_port() -> int:
    """A TCP port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Daemon:
    """One process in a group of its own; everything it says goes to a log file."""

    def __init__(self, command: Sequence[str], log: Path, *, user: str | None = None) -> None:
        self.command, self.log, self.user = list(command), log, user
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        """Start it from the main thread: it ends with the thread that started it. The caller waits for it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_mortal(self.user), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, signum: int) -> None:
        """A signal to the whole group."""
        assert self.process is not None
        os.killpg(self.process.pid, signum)

    def stop(self, signum: int = signal.SIGTERM, timeout_s: float = 10.0) -> None:
        """Ask it to end, and end it when it does not."""
        if self.process is None:
            return
        for each, wait_s in ((signal.SIGCONT, 0.0), (signum, timeout_s), (signal.SIGKILL, None)):
            try:
                self.send(each)
            except ProcessLookupError:
                break
            if wait_s != 0.0 and self._ended(wait_s):
                break
        self.process.wait()
        self.process = None

    def _ended(self, timeout_s: float | None) -> bool:
        assert self.process is not None
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


def _mortal(user: str | None) -> list[str]:
    """The words before a command that make it end with its parent, and run as another user where asked."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return as_user(user)
    identity = [f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
    return [setpriv, *identity, "--pdeathsig", "KILL", "--"]


def as_user(user: str | None) -> list[str]:
    """The words before a command that make it run as another user; none when that is not asked."""
    return ["runuser", "-u", user, "--"] if user else []
