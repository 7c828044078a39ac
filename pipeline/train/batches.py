"""A rank's batches on its device: the next one is fetched and copied there while this one is computed with."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.rng import ids_from_words
from pipeline.train.task import Text


class BatchLike(Protocol):
    """This rank's share of one global batch: raw latents [b, c, h, w], ids uint64 [b, 2], labels [b] or None.

    text: embeddings [b, l, d] and which of the l are tokens [b, l], or None. Latents and embeddings may be as
    stored (see `stored_values`). dataset: which of several all its samples are of; epoch: that dataset's.
    """

    @property
    def epoch(self) -> int: ...
    @property
    def dataset(self) -> int: ...
    @property
    def latents(self) -> np.ndarray: ...
    @property
    def sample_ids(self) -> np.ndarray: ...
    @property
    def labels(self) -> np.ndarray | None: ...
    @property
    def text(self) -> tuple[np.ndarray, np.ndarray] | None: ...


@dataclass(frozen=True)
class DeviceBatch:
    """What a step computes with, on its device: latents and embeddings in the dtype they are stored in."""

    source: BatchLike
    latents: Tensor
    ids: Tensor
    labels: Tensor | None
    text: Text | None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of it."""
        optional = [self.labels, *(self.text or ())]
        return [self.latents, self.ids, *(tensor for tensor in optional if tensor is not None)]


def stored_values(stored: np.ndarray) -> Tensor:
    """Values as the stream gives them, not copied: float16, float32, or the bits of bfloat16 as uint16."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def copied(batch: BatchLike, device: torch.device) -> DeviceBatch:
    """The batch on a device; the host waits for no copy to a GPU, for it is made from pinned memory."""

    def copy(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    text = batch.text
    return DeviceBatch(
        batch,
        latents=copy(stored_values(batch.latents)),
        ids=copy(ids_from_words(batch.sample_ids)),
        labels=None if batch.labels is None else copy(torch.from_numpy(batch.labels)),
        text=None if text is None else (copy(stored_values(text[0])), copy(torch.from_numpy(text[1]))),
    )


class CopiedAhead(Iterator[DeviceBatch]):
    """Batches on a device, one ahead: a thread fetches, pins and copies it on a stream of its own.

    Whoever asks waits for data alone, and gets what the thread raised. `close` asks for no more without waiting: the
    thread ends with the batch it is at.
    """

    def __init__(self, batches: Iterator[BatchLike], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._uploads: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._uploads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copied-ahead")
        self._next: Future[DeviceBatch | None] = self._thread.submit(self._fetch)

    def __next__(self) -> DeviceBatch:
        batch = self._next.result()
        if batch is None:
            raise StopIteration
        if self._uploads is not None:
            # What is queued from now on waits for the copy, and its memory is not given away before that is done.
            working = torch.cuda.current_stream(self._device)
            working.wait_stream(self._uploads)
            for tensor in batch.tensors:
                tensor.record_stream(working)
        self._next = self._thread.submit(self._fetch)
        return batch

    def _fetch(self) -> DeviceBatch | None:
        batch = next(self._batches, None)
        with nullcontext() if self._uploads is None else torch.cuda.stream(self._uploads):
            return None if batch is None else copied(batch, self._device)

    def close(self) -> None:
        """Fetch no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


@contextmanager
def on_device(batches: Iterator[BatchLike], device: torch.device) -> Iterator[Iterator[DeviceBatch]]:
    """The batches on a device: ahead on a GPU, elsewhere when they are asked for."""
    if device.type != "cuda":
        yield (copied(batch, device) for batch in batches)
        return
    ahead = CopiedAhead(batches, device)
    try:
        yield ahead
    finally:
        ahead.close()
