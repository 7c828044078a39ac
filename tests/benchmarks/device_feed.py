"""What keeps a device busy: the processors that an image costs before it gets there, and what of that takes turns.

    python -m tests.benchmarks.device_feed [--sides 256 512 1024] [--sources 0.3 1 3 12] [--seconds 6] [--gpu H100]
        [--utilisation 0.4] [--cores 2] [--data FOLDER] [--out DIR]

The encode job's actor, with its threads and batches, decodes JPEGs for a *paced* codec, which takes the time a GPU
would take for a batch and computes nothing (tests/support/paced.py): FLOPs of Stable Diffusion's encoder at a share
(`--utilisation`) of the GPU's half-precision peak. That time is computed; everything else is measured, in a process
of its own for each line:

- CPU ms: of the whole process for one image, with as many decode threads as `--cores`, fed by a GPU that is never
  the slower one. The GPU's ms for one image divide it: cores that a GPU needs.
- lock ms: milliseconds for one image in which a thread holds the interpreter's lock, sampled by py-spy, and the share
  of that which decoding has. What holds the lock takes turns, however many cores there are: it bounds the images/s of
  one process, hence the processes that a GPU needs.
- busy: share of the time in which the paced device worked. On this machine's cores with the GPU itself, beside what
  those cores could give at most; and with a GPU that is slower so far that 80 % of these cores feed it: the aim is
  0.95 there.

Sources are mosaics of photographs at their own scale. Nothing is read and nothing written; rows arrive as bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.codec.config import CodecConfig
from pipeline.dataflow import monitor as reporting
from pipeline.encode.plan import PEAK_TFLOPS
from pipeline.encode.rows import raw_table
from pipeline.encode.stages import BLOCK_BYTES, EncodeBlocks, EncoderSpec, calls_of
from pipeline.source.config import ImageConfig
from pipeline.source.reading.rows import SourceRow
from tests.benchmarks import report
from tests.benchmarks.decode import as_jpeg, mosaic, photographs
from tests.benchmarks.photographs import MADE_UP, REAL, data_folder
from tests.support.monitor import LocalMonitor
from tests.support.paced import flops, install

Size = tuple[int, int]
NEVER_SLOWER = 1e9  # TFLOP/s
_RATE = 250  # samples a second
HEADS = (
    *("px", "source MP", "CPU ms", "GPU ms", "cores a GPU", "lock ms", "of it decoding", "a process images/s"),
    *("processes a GPU", "busy here", "at most", "busy, slower GPU"),
)


def size_of(megapixels: float) -> Size:
    """Height and width of a 3:4 picture."""
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    return height, height * 4 // 3


# -- One case, in a process of its own -------------------------------------------------------------------------


def feed(
    codec: CodecConfig,
    jpeg: Path,
    side: int,
    cores: int,
    batch: int,
    seconds: float,
    *,
    device: str = "cpu",
    on_ready: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Feed a codec's device with one JPEG again and again, for so long once all is warm."""
    reporting._SEND_S = 0.0  # figures of a few seconds: each batch is told when it is done
    monitor = LocalMonitor()
    data, stop = jpeg.read_bytes(), threading.Event()
    calls = calls_of(1.0, batch, len(data))
    spec = EncoderSpec(
        codec=codec,
        image=ImageConfig(resolution=side, multiple_of=8, max_upscale=1e6),
        source_uri="memory://benchmark",
        latent_dtype="float16",
        batch_size=batch,
        decode_threads=cores,
        threads=1,
        device=device,
        largest=(side, side),
        decoded=False,
        calls=calls,
    )
    actor = EncodeBlocks(spec, monitor)
    rows = range(min(1024, max(1, BLOCK_BYTES // len(data))))  # as a read task cuts them

    def call(number: int) -> None:
        for unit in itertools.takewhile(lambda _: not stop.is_set(), itertools.count(number, calls)):
            actor(raw_table(unit, [SourceRow(row, f"{unit}-{row}", data, source="s") for row in rows]))

    callers = [threading.Thread(target=call, args=[number], name=f"call {number}") for number in range(calls)]
    for caller in callers:
        caller.start()

    def batch_done(rows: float) -> tuple[dict[str, float], float, float]:
        """Totals, CPU seconds and time as soon as a batch is done, and so many rows are at least.

        A batch of large sources takes a second: a window that ends anywhere would miss the last one nearly whole.
        That one is done is known when it is fetched, which may be somewhat later.
        """
        known = totals = monitor.state.totals()[0]
        while totals.get("rows", 0) < rows or totals.get("device_s", 0.0) == known.get("device_s", 0.0):
            time.sleep(0.005)
            totals = monitor.state.totals()[0]
        return totals, time.process_time(), time.perf_counter()

    batch_done(2 * batch)
    on_ready()
    before, cpu, began = batch_done(0)
    time.sleep(seconds)
    after, cpu_after, ended = batch_done(before["rows"] + 8 * batch)  # few large sources: a longer look
    cpu, wall = cpu_after - cpu, ended - began
    stop.set()
    images = after["rows"] - before["rows"]
    for caller in callers:
        caller.join()
    return {
        "images_per_s": images / wall,
        "cpu_ms": 1e3 * cpu / images,
        "busy": (after["device_s"] - before["device_s"]) / wall,
    }


# -- All cases -------------------------------------------------------------------------------------------------


class Feeds:
    """Runs cases in children; `pyspy`: the sampler's command, None without it."""

    def __init__(self, place: Path, chosen: argparse.Namespace) -> None:
        self._place, self._chosen, self._pyspy = place, chosen, shutil.which("py-spy", path=_search())
        install(place / "site")

    def run(self, jpeg: Path, side: int, tflops: float, *, sampled: bool = False) -> dict[str, float]:
        """Figures of `feed`, and of the lock where it is sampled and can be."""
        chosen = self._chosen
        case = (jpeg, side, tflops, chosen.cores, max(1, chosen.batch * 1024**2 // side**2), chosen.seconds)
        path = os.pathsep.join([str(self._place / "site"), os.getcwd(), os.environ.get("PYTHONPATH", "")])
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.device_feed", "--case", *map(str, case)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        lock = {}
        if child.stdout.readline() == "ready\n" and sampled and self._pyspy:
            lock = self._sample(child.pid)
        out = child.communicate()[0]
        if child.returncode:
            raise SystemExit(f"feeding {jpeg.name} at {side} px ended with exit code {child.returncode}")
        return {**json.loads(out), **lock}

    def _sample(self, pid: int) -> dict[str, float]:
        """Share of the time in which some thread holds the lock, and of that the share of threads that decode."""
        stacks, seconds = self._place / f"{pid}.txt", max(1, int(self._chosen.seconds) - 1)
        command = [str(self._pyspy), "record", "--gil", "--threads", "--nonblocking", "--rate", str(_RATE)]
        command += ["--duration", str(seconds), "--format", "raw", "--output", str(stacks), "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"py-spy cannot watch a process here: {done.stderr.strip()}")
        lines = [line.rpartition(" ") for line in stacks.read_text().splitlines()]
        held = sum(int(count) for _, _, count in lines)
        decoding = sum(int(count) for stack, _, count in lines if "decode_" in stack.partition(";")[0])
        return {"lock": held / (_RATE * seconds), "lock_decoding": decoding / max(1, held)}


def _search() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def line(feeds: Feeds, jpeg: Path, side: int, tflops: float, cores: int) -> dict[str, float]:
    """One size of pixels from one size of source."""
    free = feeds.run(jpeg, side, NEVER_SLOWER, sampled=True)
    gpu_ms = 1e3 * flops(side, side) / (tflops * 1e12)
    needed = free["cpu_ms"] / gpu_ms
    slower = tflops * min(1.0, 0.8 * cores / needed)
    lock_ms = 1e3 * free.get("lock", math.nan) / free["images_per_s"]
    return {
        "cpu_ms": free["cpu_ms"],
        "gpu_ms": gpu_ms,
        "cores": needed,
        "lock_ms": lock_ms,
        "lock_decoding": free.get("lock_decoding", math.nan),
        "process_images_per_s": 1e3 / lock_ms,
        "processes": lock_ms / gpu_ms,
        "busy": feeds.run(jpeg, side, tflops)["busy"],
        "busy_at_most": min(1.0, cores / needed),
        "busy_slower": feeds.run(jpeg, side, slower)["busy"],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--sources", type=float, nargs="*", default=[0.3, 1, 3, 12], help="megapixels")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each case")
    parser.add_argument("--gpu", choices=sorted(PEAK_TFLOPS), default="H100")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the GPU's peak")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=8, help="images of 1024 px; of smaller ones as many pixels")
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.case:
        jpeg, side, tflops, cores, batch, seconds = chosen.case
        codec = CodecConfig(path=f"tflops-{tflops}", kind="paced")
        flops(int(side), int(side))  # counted once, before the clock runs
        case = (Path(jpeg), int(side), int(cores), int(batch), float(seconds))
        print(json.dumps(feed(codec, *case, on_ready=lambda: print("ready", flush=True))))
        return
    tflops = PEAK_TFLOPS[chosen.gpu] * chosen.utilisation
    kind = REAL if chosen.data else MADE_UP
    print(f"photographs: {kind}; a {chosen.gpu} at {chosen.utilisation:.0%} of its peak, {chosen.cores} cores")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        feeds, pictures = Feeds(place, chosen), photographs(chosen.data)
        for megapixels in chosen.sources:
            jpeg = place / f"{megapixels:g}.jpg"
            jpeg.write_bytes(as_jpeg(mosaic(pictures, *size_of(megapixels))))
            for side in chosen.sides:
                found.append(
                    {"side": side, "megapixels": megapixels, **line(feeds, jpeg, side, tflops, chosen.cores)}
                )
                print(found[-1], file=sys.stderr, flush=True)
    found.sort(key=lambda figures: (figures["side"], figures["megapixels"]))
    print(report.table(HEADS, [[str(f["side"]), *list(f.values())[1:]] for f in found]))
    if any(math.isnan(f["lock_ms"]) for f in found):
        print("-: py-spy is not installed (pip install py-spy)")
    about = {"gpu": chosen.gpu, "utilisation": chosen.utilisation, "cores": chosen.cores, "photographs": kind}
    report.write(chosen.out, "device_feed", {**about, "lines": found})
    cores = {f"{f['side']} px from {f['megapixels']:g} MP": f["cores"] for f in found}
    report.bars(chosen.out, "device_feed", f"cores that feed a {chosen.gpu}", cores, "cores")


if __name__ == "__main__":
    main()
