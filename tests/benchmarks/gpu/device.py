"""The device under test: its clock, its peak, its kernels, and what to do when its memory runs out."""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from pipeline.dataflow.device_faults import out_of_memory
from pipeline.train.loop import peak_flops

T = TypeVar("T")
Span = tuple[float, float]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_COMPILER = ("torch._dynamo", "torch._inductor")  # where a network that cannot be compiled raises from
_QUERY = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")


@dataclass
class Bench:
    """Where figures are taken and how; `notes` is everything a reader of the figures must know."""

    device: torch.device
    dtype: str
    compiled: tuple[bool, ...]
    warmup: int
    peak: float = 0.0
    datasheet: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The arithmetic of the networks."""
        return DTYPES[self.dtype]

    def now(self) -> float:
        """The clock, when the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def autocast(self) -> torch.autocast:
        """As the product computes: float32 weights, the products of matrices in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def say(self, note: str) -> None:
        """Tell it now and with the figures."""
        self.notes.append(note)
        print(f"note: {note}", file=sys.stderr, flush=True)

    def shares(self, flops_per_s: float) -> dict[str, float | None]:
        """A rate as parts of the measured peak and of the data sheet's."""
        return {
            "of_measured_peak": flops_per_s / self.peak,
            "of_datasheet_peak": flops_per_s / self.datasheet if self.datasheet else None,
        }

    def start_memory(self) -> None:
        """Count peak memory from here."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_gib(self) -> float | None:
        """Most GiB of tensors at one time since `start_memory`; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None

    def release(self) -> None:
        """Give back what the last network held, and forget its compiled forms."""
        if any(self.compiled):
            torch.compiler.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def medians(bench: Bench, rounds: int, sides: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of a round of each side, in rounds in which the sides take turns."""
    for work in sides.values():
        for _ in range(bench.warmup):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            start = bench.now()
            work()
            seconds[name].append(bench.now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def fitting(bench: Bench, what: str, batch: int, attempt: Callable[[int], T]) -> tuple[int, T] | None:
    """The largest of batch, batch / 2, ... that fits the memory, and what came of it.

    None where not one image fits, or where the network cannot be compiled here; a note says which.
    """
    while True:
        try:
            return batch, attempt(batch)
        except RuntimeError as error:
            if type(error).__module__.startswith(_COMPILER) and not out_of_memory(error):
                bench.say(f"{what}: left out, torch.compile failed: {str(error).strip().splitlines()[0]}")
                return None
            if not out_of_memory(error):
                raise
        bench.release()  # outside: an exception in flight keeps every tensor of its frames
        if batch == 1:
            bench.say(f"{what}: out of memory with one image, left out")
            return None
        bench.say(f"{what}: out of memory with batch {batch}, tried again with {batch // 2}")
        batch //= 2


class Kernels:
    """Seconds in which at least one kernel ran between `start` and `stop`; None where there is no GPU to watch."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._profile = None
        if bench.cuda:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)

    def start(self) -> None:
        """From here."""
        if self._profile is not None:
            self._bench.now()
            self._profile.start()

    def stop(self) -> float | None:
        """To here."""
        if self._profile is None:
            return None
        self._bench.now()
        self._profile.stop()
        spans = kernel_spans(self._profile.events() or ())
        if not spans:
            self._bench.say("the profiler saw no kernel: no device-busy share")
            return None
        return covered(spans) / 1e6

    def during(self, work: Callable[[], object]) -> float | None:
        """Of one call of `work`."""
        self.start()
        work()
        return self.stop()


def kernel_spans(events: Iterable[Any]) -> list[Span]:
    """(start, end) in microseconds of what a profile saw a device compute: no copies, fills or annotations."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type != torch.autograd.DeviceType.CPU
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of intervals: what runs side by side counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def measured_peak(bench: Bench, sizes: Iterable[int], rounds: int, calls: int = 20) -> tuple[float, int]:
    """FLOP/s of the fastest square matmul among `sizes` in the networks' arithmetic, and its size."""
    best, at = 0.0, 0
    for size in sizes:
        a, b = (torch.randn(size, size, device=bench.device).to(bench.torch_dtype) for _ in range(2))
        out = torch.empty_like(a)

        def work(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            for _ in range(calls):
                torch.mm(a, b, out=out)

        rate = calls * 2.0 * size**3 / medians(bench, rounds, {"matmul": work})["matmul"]
        best, at = max((best, at), (rate, size))
    bench.release()
    return best, at


def facts(bench: Bench, size: int) -> dict[str, Any]:
    """The device in words and numbers; `size` is that of the matmul whose rate is the measured peak."""
    found: dict[str, Any] = {
        "type": bench.device.type,
        "dtype": bench.dtype,
        "measured_peak_flops": bench.peak,
        "measured_by": f"matmul of {size} x {size} in {bench.dtype}",
    }
    if not bench.cuda:
        return {**found, "threads": torch.get_num_threads()}
    card = torch.cuda.get_device_properties(bench.device)
    return {
        **found,
        "name": card.name,
        "memory_bytes": card.total_memory,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(f"GPU-{card.uuid}"),
        "datasheet_peak_flops": bench.datasheet,
        "datasheet_source": bench.datasheet
        and f"the maker's data sheet for {card.name}, bf16 without sparsity, as listed in pipeline/train/loop.py",
    }


def nvidia_smi(uuid: str) -> dict[str, str] | None:
    """Driver, power limit and highest clocks as the driver's own tool tells them; None without the tool."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in asked.stdout.strip().split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else None


def datasheet_peak(device: torch.device) -> float | None:
    """The bf16 peak that the maker states for the device, where the product knows it."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
