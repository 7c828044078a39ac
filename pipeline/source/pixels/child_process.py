"""Child processes under limits, spoken to over their standard pipes: a JSON header, then bytes; no pickle.

    parent: Child(module, memory) .send(header, blobs) .receive_header(..) .receive(..)   child: limit(), then a loop
            pool.take / pool.give_back                                                           over read_header

A child takes one task at a time. It sets its own alarms for each (`alarms`), whose default action ends it even
inside C code: CPU seconds, so that a busy machine does not turn sound data into timeouts, and more seconds of wall
clock for whatever waits. Its address space is limited. A parent that dies closes the pipes, which ends its children.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import queue
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

_CHUNK = 1 << 20
_MAX_HEADER_BYTES = 64 << 20


class Child:
    """One child process and its pipes, used by one thread at a time."""

    def __init__(self, module: str, memory_mb: int) -> None:
        self.memory_mb = memory_mb
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            bufsize=0,
        )

    def alive(self) -> bool:
        """Whether the process can take another task."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process now and reap it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def exit_code(self) -> int:
        """How it ended: minus the signal's number, or the code; waits for the end."""
        return self._process.wait()

    def send(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Hand over a header and bytes; BrokenPipeError when the child has ended."""
        assert self._process.stdin is not None
        send(self._process.stdin, header, blobs)

    def receive_header(self, deadline: float) -> dict[str, Any]:
        """The child's next header; EOFError when it has ended, or has to be ended because `deadline` has passed."""
        size = int.from_bytes(self.receive(8, deadline), "little")
        if size > _MAX_HEADER_BYTES:
            self._process.kill()  # no header of ours: the process is not sound any more
            raise EOFError
        header: dict[str, Any] = json.loads(self.receive(size, deadline))
        return header

    def receive(self, size: int, deadline: float) -> bytes:
        """`size` bytes from the child, by the monotonic clock's `deadline`; EOFError as above."""
        assert self._process.stdout is not None
        out = bytearray()
        while len(out) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()  # its own alarms failed: a stopped process
                raise EOFError
            part = self._process.stdout.read(min(size - len(out), _CHUNK))
            if not part:
                raise EOFError
            out += part
        return bytes(out)


def _environment() -> dict[str, str]:
    """What a child gets: where modules are, and nothing of the parent's secrets.

    Where this package lies comes last: in a checkout that is the current directory, whose files must not pass for
    installed ones.
    """
    home = str(Path(__file__).parents[3])
    places = [place for place in sys.path if place and os.path.realpath(place) not in (os.getcwd(), home)]
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {**libraries, "PYTHONPATH": os.pathsep.join([*places, home]), "PYTHONDONTWRITEBYTECODE": "1"}


C = TypeVar("C", bound=Child)


class Pool(Generic[C]):
    """Idle children of one kind: started when first needed, at most one per thread that uses them."""

    def __init__(self, start: Callable[[int], C]) -> None:
        self._start = start
        self.idle: queue.LifoQueue[C] = queue.LifoQueue()
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def take(self, memory_mb: int) -> C:
        """An idle child with this much address space, or a new one."""
        with self._lock:
            if self._owner != os.getpid():  # after a fork: the pipes of inherited children belong to the parent
                self._owner = os.getpid()
                while not self.idle.empty():
                    self.idle.get_nowait()
        while True:
            try:
                child = self.idle.get_nowait()
            except queue.Empty:
                return self._start(memory_mb)
            if child.alive() and child.memory_mb == memory_mb:
                return child
            child.kill()

    def give_back(self, child: C) -> None:
        """Keep a child that finished its task for the next one."""
        if child.alive():
            self.idle.put(child)
        else:
            child.kill()

    def close(self) -> None:
        """End every idle child; the next task starts a new one."""
        while self._owner == os.getpid() and not self.idle.empty():
            self.idle.get_nowait().kill()


def send(pipe: IO[bytes], header: dict[str, Any], blobs: list[bytes]) -> None:
    """Write a header and bytes."""
    text = json.dumps(header).encode()
    for blob in (len(text).to_bytes(8, "little") + text, *blobs):
        view = memoryview(blob)
        while view:
            view = view[pipe.write(view) :]


# -- in the child --------------------------------------------------------------------------------------------


def read_exactly(pipe: IO[bytes], size: int) -> bytes:
    """`size` bytes from the parent; EOFError when it closed the pipe."""
    out = bytearray()
    while len(out) < size:
        part = pipe.read(min(size - len(out), _CHUNK))
        if not part:
            raise EOFError
        out += part
    return bytes(out)


def read_header(pipe: IO[bytes]) -> dict[str, Any]:
    """The parent's next header; EOFError when it closed the pipe."""
    header: dict[str, Any] = json.loads(read_exactly(pipe, int.from_bytes(read_exactly(pipe, 8), "little")))
    return header


def limited_pipes(memory_mb: int) -> tuple[IO[bytes], IO[bytes]]:
    """(from the parent, to the parent); from here on limits hold: no network, no further rights or processes."""
    source, sink = os.fdopen(0, "rb", buffering=0), os.fdopen(1, "wb", buffering=0)
    # Signals of a terminal or a scheduler are for the parent, whose end closes our pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _confine()
    return source, sink


_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000


def _confine() -> None:
    """Linux: no program gains rights, no other process starts, and no network, where the kernel lets everybody."""
    if not sys.platform.startswith("linux"):
        return
    system = ctypes.CDLL(None, use_errno=True)
    system.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if system.unshare(_CLONE_NEWNET):  # only a superuser may by itself
        system.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    _stay_alone(system)


@dataclass(frozen=True)
class _Calls:
    """Numbers of a machine: its audit name (linux/audit.h) and its system calls (asm/unistd.h)."""

    audit: int
    clone: int
    tgkill: int
    # fork and vfork where there are any, execve, execveat; then what reaches into other processes: kill, tkill,
    # ptrace, process_vm_readv and writev, rt_sigqueueinfo, rt_tgsigqueueinfo.
    refused: tuple[int, ...]
    clone3: int = 435
    pidfds: tuple[int, ...] = (424, 438)  # pidfd_send_signal, pidfd_getfd


_MACHINES = {
    "x86_64": _Calls(0xC000003E, 56, 234, (57, 58, 59, 322, 62, 200, 101, 310, 311, 129, 297)),
    "aarch64": _Calls(0xC00000B7, 220, 131, (221, 281, 129, 130, 117, 270, 271, 138, 240)),
}
# Classic BPF (linux/bpf_common.h) over struct seccomp_data: number at 0, machine at 4, first argument at 16.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x50000, 0x80000000
_X32 = 0x40000000  # the second numbering of x86-64 begins here


def _stay_alone(system: ctypes.CDLL) -> None:
    """Refuse what makes a process, runs a program or reaches into others; threads may start, as decoders use some.

    A limit on processes would count all of this user's, threads too, and bind no superuser; a filter binds everybody.
    """
    calls = _MACHINES.get(platform.machine())
    if calls is None or sys.maxsize < 1 << 32:  # a program of 32 bits has other numbers
        return
    refusal = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    steps = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, calls.audit), (_RETURN, 0, 0, _KILL_PROCESS), (_LOAD, 0, 0, 0)]
    steps += [(_IF_AT_LEAST, 0, 1, _X32), refusal]
    for number in calls.refused + calls.pidfds:
        steps += [(_IF_EQUAL, 0, 1, number), refusal]
    # A signal to itself is how a process aborts.
    steps += [(_IF_EQUAL, 0, 4, calls.tgkill), (_LOAD, 0, 0, 16), (_IF_EQUAL, 1, 0, os.getpid()), refusal]
    steps += [(_RETURN, 0, 0, _ALLOW)]
    # Its arguments lie in memory, where no filter looks: without it the C library starts threads by clone.
    steps += [(_IF_EQUAL, 0, 1, calls.clone3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    steps += [(_IF_EQUAL, 0, 3, calls.clone), (_LOAD, 0, 0, 16), (_IF_SET, 1, 0, _CLONE_THREAD), refusal]
    code = b"".join(struct.pack("HBBI", *step) for step in [*steps, (_RETURN, 0, 0, _ALLOW)])
    buffer = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
    system.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


def alarms(cpu_s: float, wall_s: float) -> None:
    """End this process after so many seconds from now; 0 takes an alarm back."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)
