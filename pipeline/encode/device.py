"""One device's traffic: pixels up on a stream of their own, latents down without stopping what is queued."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

Latents = npt.NDArray[np.float32]


class DeviceQueue:
    """Hands batches to a device and results back, so that it computes one batch while the next is copied to it.

    On CUDA the host memory is pinned and `depth` batches may be queued; on a CPU everything is done at once.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._uploads: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._uploads = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def depth(self) -> int:
        """Batches to keep queued on the device while the host prepares the next."""
        return 0 if self._uploads is None else 2

    def host_batch(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised uint8 host memory of that shape, pinned where that makes copies asynchronous."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._uploads is not None)

    def upload(self, batch: torch.Tensor) -> torch.Tensor:
        """The batch on the device; work queued from now on waits for the copy, work queued before does not."""
        if self._uploads is None:
            return batch
        with torch.cuda.stream(self._uploads):
            on_device = batch.to(self._device, non_blocking=True)
        working = torch.cuda.current_stream(self._device)
        working.wait_stream(self._uploads)
        on_device.record_stream(working)
        return on_device

    def download(self, latents: torch.Tensor) -> Callable[[], Latents]:
        """Queue the way back behind the latents' own work; the answer waits for that much and no later work."""
        if self._uploads is None:
            host = latents.float()
            return host.numpy
        host = torch.empty(latents.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(latents.float(), non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))

        def fetch() -> Latents:
            done.synchronize()
            fetched: Latents = host.numpy()
            return fetched

        return fetch

    def release_cached(self) -> None:
        """Give back memory that is kept for later use, before a smaller batch is tried."""
        if self._uploads is not None:
            torch.cuda.empty_cache()
