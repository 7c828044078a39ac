"""How fast a run goes and what it waits for: images/s, share of time spent waiting for data, MFU, memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense bf16 tensor-core peaks without sparsity, FLOP/s, from the makers' data sheets; matched by prefix.
_PEAK_FLOPS = {
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA A100": 311.9e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181.05e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
}


def peak_flops(device_name: str) -> float | None:
    """The bf16 peak of a known device in FLOP/s, None of any other and of a part of one (MIG)."""
    if " MIG " in device_name:
        return None
    matches = [name for name in _PEAK_FLOPS if device_name.startswith(name)]
    return _PEAK_FLOPS[max(matches, key=len)] if matches else None


class Meter:
    """Time since the last reading, split into waiting for data and the rest; hooks and checkpoints are left out.

    flops_per_image (forward and backward) and peak (FLOP/s of one device times ranks) give MFU where both are known.
    """

    def __init__(self, flops_per_image: float | None = None, peak: float | None = None) -> None:
        self.flops_per_image, self.peak = flops_per_image, peak
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._images, self._wait_s, self._paused_s = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    def step(self, images: int) -> None:
        """One step over `images` images is done."""
        self._images += images

    def figures(self) -> dict[str, float]:
        """The figures since the last call."""
        elapsed = max(1e-9, time.perf_counter() - self._start - self._paused_s)
        rate = self._images / elapsed
        out = {"images_per_s": rate, "data_wait_share": self._wait_s / elapsed}
        if self.flops_per_image and self.peak:
            out["mfu"] = rate * self.flops_per_image / self.peak
        if torch.cuda.is_available():
            out["memory_bytes"] = float(torch.cuda.max_memory_allocated())
        self._reset()
        return out
