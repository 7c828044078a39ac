"""The work on the device: pixels to latents in batches of one fixed shape per bucket. Knows no Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.codec.codec import Codec, posterior_seed
from pipeline.encode.blocks import ENCODED
from pipeline.encode.decoding import Item, rejection
from pipeline.source.reasons import Reason
from pipeline.store.schema import pack_latents

_IN_FLIGHT = 2  # batches queued on the device while the host prepares the next


@dataclass
class _Running:
    """A batch on the device whose latents have not been fetched yet."""

    items: list[Item]
    latents_NCHW: torch.Tensor


@dataclass
class Usage:
    """Seconds this encoder spent, and rows it finished; sums over its life."""

    wait_s: float = 0.0
    device_s: float = 0.0
    stored: int = 0
    rejected: int = 0
    halvings: int = 0


@dataclass
class Encoder:
    """Encodes items; the last batch of a bucket is padded, so that a latent does not depend on its batch-mates.

    `batch_size` holds for the largest bucket by area; smaller buckets get proportionally more. A batch that does
    not fit the device's memory is halved for good; an image on which the codec fails alone is rejected.
    """

    codec: Codec
    posterior: str
    latent_dtype: str
    batch_size: int
    max_area: int
    source_uri: str
    device: str = "cpu"
    usage: Usage = field(default_factory=Usage)
    _limits: dict[tuple[int, int], int] = field(default_factory=dict)
    _running: deque[_Running] = field(default_factory=deque)

    def encode(self, items: Iterable[Item], on_batch: Callable[[int], None] | None = None) -> pa.Table:
        """An ENCODED table of all items, ordered by (unit, row, variant); `on_batch` hears of finished rows."""
        queues: dict[tuple[int, int], list[Item]] = {}
        rows: list[dict[str, Any]] = []
        asked = time.perf_counter()
        for item in items:
            self.usage.wait_s += time.perf_counter() - asked
            if item.pixels is None:
                rows.append(item.values)
            else:
                size = (item.pixels.shape[0], item.pixels.shape[1])
                queue = queues.setdefault(size, [])
                queue.append(item)
                if len(queue) >= self._limit(size):
                    rows += self._submit(queues.pop(size), on_batch)
            asked = time.perf_counter()
        for queue in queues.values():
            rows += self._submit(queue, on_batch)
        while self._running:
            rows += self._fetch(on_batch)
        rows.sort(key=lambda r: (r["unit"], r["row"], r.get("variant") or 0))
        self.usage.rejected += sum(r["outcome"] in ("rejected", "filtered") for r in rows)
        return _withdraw_partial(pa.Table.from_pylist(rows, schema=ENCODED))

    def _limit(self, size: tuple[int, int]) -> int:
        return self._limits.setdefault(size, max(1, self.batch_size * self.max_area // (size[0] * size[1])))

    def _submit(self, items: list[Item], on_batch: Callable[[int], None] | None) -> list[dict[str, Any]]:
        """Queue a batch on the device; returns the rows of older batches that had to make room."""
        began = time.perf_counter()
        rows: list[dict[str, Any]] = []
        for part, latents in self._run(items, rows):
            self._running.append(_Running(part, latents))
        self.usage.device_s += time.perf_counter() - began
        while len(self._running) > (_IN_FLIGHT if self.device.startswith("cuda") else 0):
            rows += self._fetch(on_batch)
        return rows

    def _run(self, items: list[Item], failed: list[dict[str, Any]]) -> list[tuple[list[Item], torch.Tensor]]:
        """(items, latents) of a batch, cut into pieces where the device or the codec demands it."""
        assert items[0].pixels is not None
        size = (items[0].pixels.shape[0], items[0].pixels.shape[1])
        limit = self._limit(size)
        if len(items) > limit:
            return self._run(items[:limit], failed) + self._run(items[limit:], failed)
        try:
            return [(items, self._call(items, size, limit))]
        except Exception as error:
            if _out_of_memory(error):
                if limit == 1:
                    raise
                self._limits[size] = limit // 2
                self.usage.halvings += 1
                if self.device.startswith("cuda"):
                    torch.cuda.empty_cache()
                return self._run(items, failed)
            if isinstance(error, torch.AcceleratorError):
                raise  # the device's context is gone: only a new process helps
            if len(items) == 1:
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                failed.append(self._failed(items[0], Reason.ENCODE_FAILED, message))
                return []
            half = len(items) // 2
            return self._run(items[:half], failed) + self._run(items[half:], failed)

    def _call(self, items: list[Item], size: tuple[int, int], limit: int) -> torch.Tensor:
        batch_NHWC = torch.zeros((limit, *size, 3), dtype=torch.uint8, pin_memory=self.device.startswith("cuda"))
        array = batch_NHWC.numpy()
        for i, item in enumerate(items):
            array[i] = item.pixels
        seeds = None
        if self.posterior == "sample":
            seeds = [posterior_seed(item.values["sample_id"]) for item in items] + [0] * (limit - len(items))
        on_device = batch_NHWC.to(self.device, non_blocking=True)
        return self.codec.encode(on_device, posterior=self.posterior, seeds=seeds)[: len(items)]

    def _fetch(self, on_batch: Callable[[int], None] | None) -> list[dict[str, Any]]:
        began = time.perf_counter()
        running = self._running.popleft()
        latents_NCHW = running.latents_NCHW.float().cpu().numpy()
        self.usage.device_s += time.perf_counter() - began
        rows = self._rows(running.items, latents_NCHW)
        self.usage.stored += len(rows)
        if on_batch:
            on_batch(len(rows))
        return rows

    def _rows(self, items: list[Item], latents_NCHW: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
        limit = np.finfo(np.float16).max if self.latent_dtype == "float16" else np.finfo(np.float32).max
        within: npt.NDArray[np.bool_] = np.abs(latents_NCHW) <= limit  # false for NaN, too
        sound = np.asarray(within.reshape(len(items), -1).all(axis=1))
        packed = pack_latents(np.where(sound[:, None, None, None], latents_NCHW, 0.0), self.latent_dtype)
        shape = list(latents_NCHW.shape[1:])
        return [
            {**item.values, "latent": data, "latent_shape": shape}
            if ok
            else self._failed(item, Reason.BAD_LATENT, f"the latent is not finite in {self.latent_dtype}")
            for item, data, ok in zip(items, packed, sound, strict=True)
        ]

    def _failed(self, item: Item, reason: Reason, message: str) -> dict[str, Any]:
        address = {name: item.values[name] for name in ("unit", "row", "key")}
        uri = f"{self.source_uri}/{item.values['key']}"
        return {**address, **rejection("rejected", reason, message), "uri": uri}


def _withdraw_partial(table: pa.Table) -> pa.Table:
    """Without the stored variants of a source row of which another variant was rejected: a row has one outcome."""
    rejected = {
        (u, r)
        for u, r, o in zip(*(table[c].to_pylist() for c in ("unit", "row", "outcome")), strict=True)
        if o in ("rejected", "filtered")
    }
    if not rejected or max(table["variants"].to_pylist()) < 2:
        return table
    seen: set[tuple[int, int]] = set()
    keep = []
    for u, r, o in zip(*(table[c].to_pylist() for c in ("unit", "row", "outcome")), strict=True):
        again = (u, r) in rejected and (o == "stored" or (u, r) in seen)
        keep.append(not again)
        if o != "stored":
            seen.add((u, r))
    return table.filter(pa.array(keep))


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in str(error)
