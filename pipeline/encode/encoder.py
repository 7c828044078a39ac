"""The work on the device: pixels to latents in batches of one fixed shape per bucket. Knows no Ray."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import torch

from pipeline.codec.codec import Codec, posterior_seed
from pipeline.dataflow.device_faults import DeviceFault, device_fault, out_of_memory
from pipeline.encode.rows import Decoded, EncodedImage, Item, Outcome, Rejected
from pipeline.errors import ConfigError
from pipeline.source.reasons import Reason
from pipeline.store.schema import pack_latents

# -- One device's traffic: pixels up on a stream of their own, latents down without stopping what is queued ----


Latents = npt.NDArray[np.float32]
Fetch = Callable[[], tuple[Latents, float]]  # waits for latents; also the seconds that the device was busy with them


class DeviceQueue:
    """Hands batches to a device and results back, so that it computes one batch while the next is copied to it.

    On CUDA the host memory is pinned and `depth` batches may be queued; on a CPU everything is done at once.
    """

    depth: int

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._uploads: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._uploads = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self.depth = 0 if self._uploads is None else 2  # batches to keep queued while the host prepares the next

    def host_batch(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised uint8 host memory of that shape, pinned where that makes copies asynchronous."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._uploads is not None)

    def submit(self, batch: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> Fetch:
        """Queue `encode` on a batch of host memory; the answer waits for that much and for no later work."""
        if self._uploads is None:
            began = time.perf_counter()
            latents: Latents = encode(batch).float().numpy()
            seconds = time.perf_counter() - began
            return lambda: (latents, seconds)
        with torch.cuda.stream(self._uploads):
            on_device = batch.to(self._device, non_blocking=True)
        working = torch.cuda.current_stream(self._device)
        # Work queued from now on waits for the copy, work queued before does not.
        working.wait_stream(self._uploads)
        on_device.record_stream(working)
        begun, done = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record(working)
        result = encode(on_device).float()
        host = torch.empty(result.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(result, non_blocking=True)
        done.record(working)

        def fetch() -> tuple[Latents, float]:
            done.synchronize()
            return host.numpy(), begun.elapsed_time(done) / 1e3

        return fetch

    def release_cached(self) -> None:
        """Give back memory that is kept for later use, before a smaller batch is tried."""
        if self._uploads is not None:
            torch.cuda.empty_cache()


# A call whose last batches are not full waits so long for another to begin, where others may; and, while others hand
# in their items, for so many of their batches.
_GRACE_S = 0.25
_PATIENCE_BATCHES = 16

Size = tuple[int, int]


@dataclass
class Usage:
    """Seconds that this encoder waited for items and its device worked, and rows it finished; sums over its life."""

    wait_s: float = 0.0
    device_s: float = 0.0
    stored: int = 0
    rejected: int = 0
    filtered: int = 0
    halvings: int = 0

    def since(self, before: Usage) -> Usage:
        """What came on top of it."""
        return Usage(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


@dataclass(eq=False)
class _Call:
    """One table on its way: what is done, and how many images are not."""

    on_batch: Callable[[int], None] | None
    done: list[Outcome] = field(default_factory=list)
    open: int = 0


Owned = tuple[_Call, Decoded]


@dataclass
class _Running:
    """A batch on the device whose latents have not been fetched yet."""

    owned: list[Owned]
    fetch: Fetch


class Encoder:
    """Encodes items in batches of one shape a bucket; padded, so that a latent does not depend on its batch-mates.

    `batch_size` holds for the largest bucket by area; smaller buckets get proportionally more. A batch that does
    not fit the device's memory is halved for good. An image on which the codec fails alone is rejected, once a batch
    of known content in the same shape has shown that the codec and its device work: else DeviceFault is raised.

    `calls` threads may encode at a time. They hand in their items one after the other and share batches: what is
    left of one table is filled up with the next, and the device works on while a table ends and another begins.
    """

    def __init__(
        self,
        codec: Codec,
        posterior: str,
        latent_dtype: str,
        batch_size: int,
        max_area: int,
        source_uri: str,
        device: str = "cpu",
        calls: int = 1,
    ) -> None:
        self.codec, self.posterior, self.latent_dtype = codec, posterior, latent_dtype
        self.batch_size, self.max_area, self.source_uri, self.calls = batch_size, max_area, source_uri, calls
        self._largest_value = float(np.finfo(np.float16 if latent_dtype == "float16" else np.float32).max)
        self.usage = Usage()
        self._reported = Usage()
        # A codec on a device that torch does not know brings the queue to it.
        self._device: DeviceQueue = getattr(codec, "queue", None) or DeviceQueue(device)
        self._limits: dict[Size, int] = {}
        self._queues: dict[Size, list[Owned]] = {}
        self._running: deque[_Running] = deque()
        self._turn = threading.Lock()  # held while a call hands in its items
        self._state = threading.Condition(threading.RLock())  # held while anything above changes
        self._submitted = 0  # batches so far
        self._taking = 0  # calls that have items to hand in
        self._ending: deque[_Call] = deque()  # calls that have handed in all
        self._broken: BaseException | None = None

    def encode(self, items: Iterable[Item], on_batch: Callable[[int], None] | None = None) -> list[Outcome]:
        """What becomes of all items, ordered by (unit, row, variant); `on_batch` hears of rows with latents."""
        call = _Call(on_batch)
        with self._changing():
            self._taking += 1
            self._state.notify_all()
        try:
            with self._turn:
                self._take(call, items)
        finally:
            with self._state:
                self._taking -= 1
                self._state.notify_all()
        self._finish(call)
        call.done.sort(key=lambda outcome: outcome.place)
        with self._state:
            statuses = [outcome.status for outcome in call.done if isinstance(outcome, Rejected)]
            self.usage.rejected += statuses.count("rejected")
            self.usage.filtered += statuses.count("filtered")
        # A source row has one outcome: where a variant was rejected, that alone.
        rejected: dict[tuple[int, int], Rejected] = {}
        for outcome in call.done:
            if isinstance(outcome, Rejected):
                rejected.setdefault(outcome.place[:2], outcome)
        return [o for o in call.done if rejected.get(o.place[:2], o) is o]

    def unreported(self) -> Usage:
        """What was used since this was asked last, by all calls together."""
        with self._state:
            news, self._reported = self.usage.since(self._reported), self.usage.since(Usage())
        return news

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone with the state. An error in it concerns batches of several calls: it ends them all."""
        with self._state:
            if self._broken is not None:
                raise self._broken
            try:
                yield
            except BaseException as error:
                self._broken = error
                self._state.notify_all()
                raise

    def _take(self, call: _Call, items: Iterable[Item]) -> None:
        asked = time.perf_counter()
        for item in items:
            with self._changing():
                self.usage.wait_s += time.perf_counter() - asked
                if isinstance(item, Decoded):
                    size = _size(item)
                    call.open += 1
                    queue = self._queues.setdefault(size, [])
                    queue.append((call, item))
                    if len(queue) >= self._limit(size):
                        self._submit(self._queues.pop(size))
                else:
                    call.done.append(item)
            asked = time.perf_counter()

    def _finish(self, call: _Call) -> None:
        """Wait for the call's latents: for its batches to fill up, as long as other calls hand in items."""
        with self._changing():
            self._ending.append(call)
            patience = self._submitted + _PATIENCE_BATCHES
            while call.open:
                mine = [size for size, queue in self._queues.items() if any(owner is call for owner, _ in queue)]
                if mine and (self._submitted >= patience or self._nobody_comes(call)):
                    for size in set(mine) & set(self._queues):
                        self._submit(self._queues.pop(size))
                elif not mine and not self._taking:
                    self._fetch()  # else whoever submits the next batches does, and the device has work meanwhile
                elif self._broken is None:
                    self._state.wait()
                if self._broken is not None:
                    raise self._broken
            self._ending.remove(call)
            self._state.notify_all()

    def _nobody_comes(self, call: _Call) -> bool:
        """Whether the call is the oldest that ends, and no other will fill its batches in any near time."""
        if self._taking or self._ending[0] is not call:
            return False
        if len(self._ending) < self.calls:
            self._state.wait_for(lambda: self._taking or self._broken, _GRACE_S)
        return not self._taking and self._broken is None

    def _limit(self, size: Size) -> int:
        return self._limits.setdefault(size, max(1, self.batch_size * self.max_area // (size[0] * size[1])))

    def _submit(self, owned: list[Owned]) -> None:
        """Queue a batch on the device; older batches that have to make room are brought back."""
        self._run(owned)
        self._submitted += 1
        while len(self._running) > self._device.depth:
            self._fetch()

    def _run(self, owned: list[Owned]) -> None:
        """Queue a batch, cut into pieces where the device or the codec demands it."""
        size = _size(owned[0][1])
        limit = self._limit(size)
        if len(owned) > limit:
            self._run(owned[:limit])
            return self._run(owned[limit:])
        try:
            fetch = self._launch([item for _, item in owned], size, limit)
        except Exception as error:
            too_large = out_of_memory(error)
            if too_large and limit == 1:
                raise _one_is_too_large(size, error) from error
            if device_fault(error) is not None:
                raise  # the device's context may be gone: only a new process helps
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            self._running.append(_Running(owned, fetch))
            return
        # Not in the handler: as long as the error lives, its frames hold what the batch has on the device.
        if too_large:
            self._halve(size)
            return self._run(owned)
        if len(owned) == 1:
            self.check_itself(size)
            return self._deliver(owned, [self._failed(owned[0][1], Reason.ENCODE_FAILED, message)])
        half = len(owned) // 2
        self._run(owned[:half])
        self._run(owned[half:])

    def check_itself(self, size: Size) -> None:
        """DeviceFault unless a batch of known content in this shape gives finite latents.

        An image is to blame only where this passes: a device, a driver or a compiler that fails, fails on any image.
        ConfigError when not even a single image fits the device's memory, or when latents do not fit their dtype.
        """
        limit = self._limit(size)
        try:
            # Grey images: nothing that a codec could have trouble with.
            latents, _ = self._encode(torch.full((limit, *size, 3), 127, dtype=torch.uint8), [0] * limit)()
        except Exception as error:
            if not out_of_memory(error):
                raise DeviceFault(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from error
            if limit == 1:
                raise _one_is_too_large(size, error) from error
        else:
            if not np.isfinite(latents).all():
                raise DeviceFault(
                    f"the codec gives latents that are not finite for known content of {size[0]}x{size[1]} pixels: "
                    "its device, its weights or its arithmetic (codec.dtype) is at fault"
                )
            largest = float(np.abs(latents).max())
            if largest > self._largest_value:
                raise ConfigError(
                    f"The codec gives latents of up to {largest:g} for a grey image, "
                    f"which {self.latent_dtype} cannot hold",
                    key="encode.latent_dtype",
                    value=self.latent_dtype,
                    rule="every stored value is finite",
                    next_step="set encode.latent_dtype=bfloat16, or see whether this codec is what codec.path should "
                    "name",
                )
            return
        self._halve(size)
        self.check_itself(size)

    def _halve(self, size: Size) -> None:
        self._limits[size] = self._limit(size) // 2
        self.usage.halvings += 1
        self._device.release_cached()

    def _launch(self, items: list[Decoded], size: Size, limit: int) -> Fetch:
        batch_NHWC = self._device.host_batch((limit, *size, 3))
        array = batch_NHWC.numpy()
        for i, item in enumerate(items):
            array[i] = item.pixels
        array[len(items) :] = 0
        seeds = [0] * limit
        if self.posterior == "sample":
            seeds[: len(items)] = [posterior_seed(item.values["sample_id"]) for item in items]
        return self._encode(batch_NHWC, seeds, len(items))

    def _encode(self, batch_NHWC: torch.Tensor, seeds: list[int], count: int | None = None) -> Fetch:
        """Queue a batch of host memory; the answer waits for the latents of its first `count` images."""
        drawn = seeds if self.posterior == "sample" else None
        return self._device.submit(
            batch_NHWC, lambda images: self.codec.encode(images, posterior=self.posterior, seeds=drawn)[:count]
        )

    def _fetch(self) -> None:
        """Bring the oldest batch back."""
        running = self._running.popleft()
        try:
            latents_NCHW, seconds = running.fetch()
        except Exception as error:
            # What was queued without complaint fails when it is waited for: no image can be named.
            raise DeviceFault(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from error
        self.usage.device_s += seconds
        items = [item for _, item in running.owned]
        within: npt.NDArray[np.bool_] = np.abs(latents_NCHW) <= self._largest_value  # false for NaN, too
        sound = np.asarray(within.reshape(len(items), -1).all(axis=1))
        if not sound.all():
            self.check_itself(_size(items[0]))
        packed = pack_latents(np.where(sound[:, None, None, None], latents_NCHW, 0.0), self.latent_dtype)
        outcomes = [
            EncodedImage(item, data, latents_NCHW.shape[1:])
            if ok
            else self._failed(item, Reason.BAD_LATENT, f"the latent is not finite in {self.latent_dtype}")
            for item, data, ok in zip(items, packed, sound, strict=True)
        ]
        self._deliver(running.owned, outcomes)

    def _deliver(self, owned: list[Owned], outcomes: Sequence[EncodedImage | Rejected]) -> None:
        stored: dict[_Call, int] = {}
        for (call, _), outcome in zip(owned, outcomes, strict=True):
            call.done.append(outcome)
            call.open -= 1
            stored[call] = stored.get(call, 0) + isinstance(outcome, EncodedImage)
        for call, count in stored.items():
            self.usage.stored += count
            if call.on_batch and count:
                call.on_batch(count)
        self._state.notify_all()

    def _failed(self, item: Decoded, reason: Reason, message: str) -> Rejected:
        unit, row, key = (item.values[name] for name in ("unit", "row", "key"))
        return Rejected(unit, row, key, f"{self.source_uri}/{key}", "rejected", str(reason), message)


def _size(item: Decoded) -> Size:
    height, width, _ = item.pixels.shape
    return height, width


def _one_is_too_large(size: Size, error: Exception) -> ConfigError:
    return ConfigError(
        f"One image of {size[0]}x{size[1]} pixels alone does not fit the device's memory: "
        f"{' '.join(str(error).split())[:200] or type(error).__name__}",
        key="image.resolution",
        value=f"{size[0]}x{size[1]}",
        rule="the codec must hold a batch of one image of the largest bucket",
        next_step="lower image.resolution, set codec.dtype=bfloat16, or use devices with more memory or fewer actors "
        "on each",
    )
