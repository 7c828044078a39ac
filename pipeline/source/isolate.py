"""Decoding in a child process that may be slow, crash or eat memory without harm to anybody.

A child takes one image at a time over its pipes (a JSON header, then the bytes; no pickle). Before each image it
sets its own alarms, whose default action ends it even inside C code: CPU seconds, so that a busy machine does not
turn sound images into timeouts, and ten times as many seconds of wall clock for whatever waits. Its address
space is limited. The parent turns a dead child into a reason and starts another with the next image.
Children are started when first needed, at most one per decoding thread, and end with their parent's pipe.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from typing import IO, Any

import numpy as np

from pipeline.source.buckets import Placement
from pipeline.source.config import ImageConfig
from pipeline.source.decode import DecodeError
from pipeline.source.reasons import Reason
from pipeline.source.render import Rendered, Rendering, render

_WALL_PER_CPU = 10.0
_GRACE_S = 10.0
_PIPE_CHUNK = 1 << 20


def render_isolated(data: bytes, sample_id: bytes, orientation_hint: int | None, image: ImageConfig) -> Rendering:
    """As `render`, in a child process; also raises DecodeError for a timeout, a crash or too much memory."""
    child = _take(image.decode_memory_mb)
    try:
        rendering = child.render(data, sample_id, orientation_hint, image)
    except DecodeError:
        _give_back(child)
        raise
    except BaseException:
        child.kill()
        raise
    _give_back(child)
    return rendering


class _Child:
    """One child process and its pipes, used by one thread at a time."""

    def __init__(self, memory_mb: int) -> None:
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        command = [sys.executable, "-m", "pipeline.source.isolate", str(memory_mb)]
        self.memory_mb = memory_mb
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )

    def alive(self) -> bool:
        """Whether the process can take another image."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process now and reap it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def render(self, data: bytes, sample_id: bytes, hint: int | None, image: ImageConfig) -> Rendering:
        """Send one image and wait for its pixels, its reason, or the child's end."""
        header = {
            "size": len(data),
            "sample_id": sample_id.hex(),
            "hint": hint,
            "image": image.model_dump_json(),
        }
        deadline = time.monotonic() + image.decode_cpu_s * _WALL_PER_CPU + _GRACE_S
        assert self._process.stdin is not None
        try:
            _send(self._process.stdin, header, [data])
            answer = json.loads(self._receive_block(deadline))
            pixels = [self._receive(size, deadline) for size in answer["sizes"]]
        except (EOFError, BrokenPipeError):
            raise self._post_mortem(image.decode_cpu_s) from None
        if "reason" in answer:
            raise DecodeError(Reason(answer["reason"]), answer["message"])
        outputs = tuple(_unpack(o, p) for o, p in zip(answer["outputs"], pixels, strict=True))
        return Rendering(outputs, answer["phash"])

    def _receive_block(self, deadline: float) -> bytes:
        return self._receive(int.from_bytes(self._receive(8, deadline), "little"), deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        out = bytearray()
        while len(out) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()  # its own alarms failed: a stopped process
                raise EOFError
            part = self._process.stdout.read(min(size - len(out), _PIPE_CHUNK))
            if not part:
                raise EOFError
            out += part
        return bytes(out)

    def _post_mortem(self, cpu_s: float) -> DecodeError:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return DecodeError(Reason.DECODE_TIMEOUT, f"decoding took more than {cpu_s:g} CPU seconds")
        if code == -signal.SIGALRM:
            return DecodeError(Reason.DECODE_TIMEOUT, f"decoding took more than {cpu_s * _WALL_PER_CPU:g} seconds")
        what = f"signal {-code}" if code < 0 else f"exit code {code}"
        return DecodeError(Reason.DECODER_CRASHED, f"the decoding process ended by {what}")


_idle: queue.LifoQueue[_Child] = queue.LifoQueue()
_owner = os.getpid()
_lock = threading.Lock()


def _take(memory_mb: int) -> _Child:
    global _owner
    with _lock:
        if _owner != os.getpid():  # after a fork: the pipes of inherited children belong to the parent
            _owner = os.getpid()
            while not _idle.empty():
                _idle.get_nowait()
    while True:
        try:
            child = _idle.get_nowait()
        except queue.Empty:
            return _Child(memory_mb)
        if child.alive() and child.memory_mb == memory_mb:
            return child
        child.kill()


def _give_back(child: _Child) -> None:
    if child.alive():
        _idle.put(child)
    else:
        child.kill()


@atexit.register
def close_children() -> None:
    """End every idle child; the next isolated image starts a new one."""
    while _owner == os.getpid() and not _idle.empty():
        _idle.get_nowait().kill()


def _unpack(output: dict[str, Any], pixels: bytes) -> Rendered:
    bucket, top, left, height, width = output["placement"]
    array = np.frombuffer(pixels, np.uint8).reshape(*bucket, 3)
    placement = Placement((bucket[0], bucket[1]), top, left, height, width)
    return Rendered(output["index"], array, placement, (output["original"][0], output["original"][1]))


def _send(pipe: IO[bytes], header: dict[str, Any], blobs: list[bytes]) -> None:
    text = json.dumps(header).encode()
    for blob in (len(text).to_bytes(8, "little") + text, *blobs):
        view = memoryview(blob)
        while view:
            view = view[pipe.write(view) :]


# -- in the child --------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _config(text: str) -> ImageConfig:
    return ImageConfig.model_validate_json(text)


def _answer(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    try:
        done = render(data, bytes.fromhex(header["sample_id"]), header["hint"], _config(header["image"]))
    except DecodeError as error:
        return {"reason": error.reason.value, "message": error.message, "sizes": []}, []
    except MemoryError:
        return {"reason": Reason.DECODE_MEMORY.value, "message": "out of memory", "sizes": []}, []
    blobs = [o.pixels.tobytes() for o in done.outputs]
    outputs = [
        {
            "index": o.resolution_index,
            "placement": [
                o.placement.bucket,
                o.placement.top,
                o.placement.left,
                o.placement.height,
                o.placement.width,
            ],
            "original": o.original,
        }
        for o in done.outputs
    ]
    return {"outputs": outputs, "phash": done.phash, "sizes": [len(b) for b in blobs]}, blobs


def _read_exactly(pipe: IO[bytes], size: int) -> bytes:
    out = bytearray()
    while len(out) < size:
        part = pipe.read(min(size - len(out), _PIPE_CHUNK))
        if not part:
            raise EOFError
        out += part
    return bytes(out)


def _serve(memory_mb: int) -> None:
    """Answer images from standard input until it closes."""
    source, sink = os.fdopen(0, "rb", buffering=0), os.fdopen(1, "wb", buffering=0)
    # Signals of a terminal or a scheduler are for the parent, whose end closes our pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            header = json.loads(_read_exactly(source, int.from_bytes(_read_exactly(source, 8), "little")))
            data = _read_exactly(source, header["size"])
        except EOFError:
            return
        cpu_s = _config(header["image"]).decode_cpu_s
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        signal.setitimer(signal.ITIMER_REAL, cpu_s * _WALL_PER_CPU)
        answer, blobs = _answer(header, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(sink, answer, blobs)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
