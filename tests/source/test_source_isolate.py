"""Decoding in a child: the same pixels, and slowness, crashes and hunger that stay there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from source_images import OPEN, encode, gradient, outcome, reason_of

from pipeline.source.config import ImageConfig
from pipeline.source.pixels import prepare as isolate
from pipeline.source.pixels.decode import DecodeError
from pipeline.source.pixels.prepare import close_children, render_isolated

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def no_children_left():
    close_children()
    yield
    close_children()


def slow_image(side: int = 1500) -> bytes:
    """A plain-text bitmap: seconds of a Python loop over few bytes per pixel."""
    return b"P3 %d %d 255\n" % (side, side) + b"1 2 3\n" * (side * side)


def test_a_child_gives_the_same_rendering_as_this_process():
    data = encode(gradient(), "PNG")
    for config in ({"phash": True, "resolution": (16, 32), "flip": True}, {"crop": "random"}):
        here, there = outcome(data, isolate="never", **config), outcome(data, isolate="all", **config)
        assert len(here) == len(there)
        for a, b in zip(here, there, strict=True):
            assert np.array_equal(a.pixels, b.pixels)
            assert (a.bucket, a.crop, a.variant, a.sample_id, a.phash, a.original) == (
                b.bucket,
                b.crop,
                b.variant,
                b.sample_id,
                b.phash,
                b.original,
            )


def test_reasons_come_back_from_the_child_and_the_child_lives_on():
    assert reason_of(b"II*\0rubbish", isolate="all") in ("corrupt", "truncated")
    first = isolate.children.idle.queue[-1]
    assert reason_of(b"", isolate="all") == "empty"
    assert isolate.children.idle.queue[-1] is first


def test_a_decode_over_its_cpu_seconds_is_ended():
    result = outcome(slow_image(), decode_cpu_s=0.3)
    assert (result.reason, result.message) == ("decode_timeout", "decoding took more than 0.3 CPU seconds")
    assert isinstance(outcome(encode(gradient(), "TIFF")), list), "the next image gets a new child"


def test_a_decode_over_its_memory_is_a_reason():
    # An honest 81 megapixel TIFF of one value, whose pixels need more than the child may have.
    from PIL import Image

    data = encode(Image.new("RGB", (9000, 9000), 7), "TIFF", compression="tiff_adobe_deflate")
    assert reason_of(data, decode_memory_mb=256) == "decode_memory"
    assert isinstance(outcome(encode(gradient(), "TIFF")), list)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_a_reason_and_not_a_crash_of_the_worker(number):
    child = isolate.children.take(3072)
    isolate.children.give_back(child)
    timer = threading.Timer(0.2, os.kill, (child._process.pid, number))
    timer.start()
    assert reason_of(slow_image()) == "decoder_crashed"
    timer.join()
    assert isinstance(outcome(encode(gradient(), "TIFF")), list)


def test_a_stopped_child_does_not_hang_the_worker(monkeypatch):
    monkeypatch.setattr(isolate, "_GRACE_S", 0.0)
    monkeypatch.setattr(isolate, "_WALL_PER_CPU", 1.0)
    child = isolate.children.take(3072)
    isolate.children.give_back(child)
    os.kill(child._process.pid, signal.SIGSTOP)
    with pytest.raises(DecodeError, match="signal 9"):
        render_isolated(encode(gradient(), "TIFF"), b"", None, ImageConfig(**OPEN, decode_cpu_s=0.5))


def test_threads_have_children_of_their_own():
    data = encode(gradient(), "TIFF")
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: outcome(data)[0].pixels, range(30)))
    assert all(np.array_equal(r, results[0]) for r in results)
    assert 1 <= isolate.children.idle.qsize() <= 3


def test_children_end_with_their_parent():
    code = (
        "from pipeline.source.pixels.prepare import children; c = children.take(3072); children.give_back(c);"
        "print(c._process.pid, flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(300):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                state = stat.read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"child {pid} outlived its parent")
