"""What one batch teaches: from raw latents and keyed randomness to a loss per sample, the same on any rank.

raw latents [b, c, h, w] --posterior draw, per-channel normalisation--> x0 --noise, t--> x_t
x_t, t, labels --model--> prediction --objective's target and weight--> loss [b]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.objectives import Objective, TimestepDensity
from pipeline.diffusion.rng import (
    ids_from_words,
    keyed_normal,
    keyed_words_for,
    normal_of,
    num_words_of_normal,
    uniform_of,
)

# (x_t [b, c, h, w], t [b], labels [b] or None[, text [b, l, d], its mask [b, l]]) -> prediction [b, c, h, w]
Forward = Callable[..., Tensor]
# Embeddings [b, l, d], which of the l are tokens: bool [b, l], and for models that read it a pooled vector [b, p].
Text = tuple[Tensor, ...]


@dataclass(frozen=True)
class Chunk:
    """Samples of one latent shape: raw latents [n, c, h, w], ids int64 [n, 2], labels [n] or None, text or None."""

    latents: Tensor
    ids: Tensor
    labels: Tensor | None
    text: Text | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """The learning problem, apart from the model.

    mean, std: float32 [c], of raw latents. num_classes: None for an unconditional model. moments: the stored
    latents are posteriors, mean and log-variance stacked on the channel axis. empty_text: the empty prompt as a
    batch of one; None for a model that reads no text.
    """

    objective: Objective
    density: TimestepDensity
    mean: Tensor
    std: Tensor
    num_classes: int | None
    label_dropout: float
    seed: int
    moments: bool = False
    text_dropout: float = 0.0
    joint_dropout: float = 0.0
    empty_text: Text | None = None

    def on(self, device: torch.device) -> Task:
        """The same problem with its constants there, so that no batch has to bring them."""
        text = None if self.empty_text is None else tuple(part.to(device) for part in self.empty_text)
        return replace(self, mean=self.mean.to(device), std=self.std.to(device), empty_text=text)

    def clean(self, raw_NCHW: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Normalised latents; where the posterior is stored, one draw of it per sample and epoch."""
        if not self.moments:
            return self._normalised(raw_NCHW, None)
        shape = self._latent_shape(raw_NCHW)
        return self._normalised(
            raw_NCHW, keyed_normal(self.seed, ids, purpose="posterior", counter=epoch, shape=shape)
        )

    def _latent_shape(self, raw_NCHW: Tensor) -> tuple[int, int, int]:
        _, channels, height, width = raw_NCHW.shape
        return channels // 2 if self.moments else channels, height, width

    def _normalised(self, raw_NCHW: Tensor, posterior_noise: Tensor | None) -> Tensor:
        if posterior_noise is not None:
            mean, log_variance = raw_NCHW.chunk(2, dim=1)
            raw_NCHW = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * posterior_noise
        shape = (1, -1, 1, 1)
        return (raw_NCHW - self.mean.to(raw_NCHW.device).view(shape)) / self.std.to(raw_NCHW.device).view(shape)

    @property
    def dropout_draws(self) -> tuple[str, ...]:
        """The purposes that key the dropout of conditions; a single condition has gone by "label" from the first."""
        both = self.num_classes is not None and self.empty_text is not None
        return ("label", "text", "joint") if both else ("label",)

    def dropped(
        self, labels: Tensor | None, text: Text | None, uniform_BK: Tensor
    ) -> tuple[Tensor | None, Text | None]:
        """Labels [b] of which a share is the index that means "no label", texts of which one is the empty prompt.

        uniform_BK: a number for each of `dropout_draws`. Of two conditions each is dropped by its own number, and
        both by the third: so all four combinations are learned. A condition that the model lacks comes back as None.
        """
        by_label, *others = uniform_BK.unbind(1)
        by_text = by_label
        if others:
            both = others[1] < self.joint_dropout
            by_label, by_text = by_label.masked_fill(both, -1.0), others[0].masked_fill(both, -1.0)
        if self.num_classes is None:
            labels = None
        elif labels is not None:
            labels = torch.where(by_label < self.label_dropout, torch.full_like(labels, self.num_classes), labels)
        if self.empty_text is None or text is None:
            return labels, None
        drop = by_text < self.text_dropout
        return labels, tuple(
            torch.where(drop.reshape(-1, *[1] * (given.ndim - 1)), empty.to(given), given)
            for given, empty in zip(text, self.empty_text, strict=True)
        )

    def training_losses(
        self,
        forward: Forward,
        raw_NCHW: Tensor,
        ids: Tensor,
        labels: Tensor | None,
        epoch: int,
        text: Text | None = None,
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(weighted loss [b] with gradients, timesteps [b]) of one micro-batch.

        Noise, times, the dropout of labels and texts, and the posterior's draw are keyed by sample and epoch.
        """
        shape = self._latent_shape(raw_NCHW)
        of_noise = num_words_of_normal(shape)
        counts = {"noise": of_noise, "time": 1, **dict.fromkeys(self.dropout_draws, 1)}
        counts |= {"posterior": of_noise} if self.moments else {}
        words = keyed_words_for(self.seed, ids, counts, counter=epoch)
        x0 = self._normalised(raw_NCHW, normal_of(words["posterior"], shape) if self.moments else None)
        t = self.density.times(uniform_of(words["time"])[:, 0], latent_pixels=shape[1] * shape[2])
        # Side by side: as many launches for three as for one.
        drop = uniform_of(torch.cat([words[purpose] for purpose in self.dropout_draws], dim=1))
        labels, text = self.dropped(labels, text, drop)
        return self.losses(forward, x0, normal_of(words["noise"], shape), t, labels, text, sizes), t

    def losses(
        self,
        forward: Forward,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        labels: Tensor | None,
        text: Text | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean squared error [b] of the prediction, in float32; sizes: see `micro_conditions`."""
        more = {} if sizes is None else {"sizes_B6": sizes}
        prediction = forward(self.objective.noisy(x0, noise, t), t, labels, *(text or ()), **more)
        error = prediction.float() - self.objective.target(x0, noise, t).float()
        return error.square().mean(dim=(1, 2, 3)) * self.objective.weight(t)


# -- A rank's batches on its device: the next one is fetched and copied there while this one is computed with --


class BatchLike(Protocol):
    """This rank's share of one global batch: raw latents [b, c, h, w], ids uint64 [b, 2], labels [b] or None.

    text: see `Text`, or None. Latents and embeddings may be as stored (see `stored_values`). sizes [b, 6] as a stream
    gives them, None where they are not asked for; bucket: "HxW" in pixels. dataset: which of several all its samples
    are of; epoch: that dataset's.
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
    def text(self) -> tuple[np.ndarray, ...] | None: ...
    @property
    def sizes(self) -> np.ndarray | None: ...
    @property
    def bucket(self) -> str: ...


@dataclass(frozen=True)
class DeviceBatch:
    """What a step computes with, on its device: latents and embeddings in the dtype they are stored in."""

    source: BatchLike
    latents: Tensor
    ids: Tensor
    labels: Tensor | None
    text: Text | None
    sizes: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of it."""
        optional = [self.labels, self.sizes, *(self.text or ())]
        return [self.latents, self.ids, *(tensor for tensor in optional if tensor is not None)]


def stored_values(stored: np.ndarray) -> Tensor:
    """Values as the stream gives them, not copied: float16, float32, or the bits of bfloat16 as uint16."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def text_tensors(stored: tuple[np.ndarray, ...]) -> Text:
    """A text as the stream gives it, widened to float32."""
    return widened_text(tuple(map(stored_values, stored)), slice(None))


def widened_text(text: Text, rows: slice) -> Text:
    """Some rows of a text: its states and its pooled vector in float32, its mask as it is."""
    return tuple(part[rows] if part.dtype == torch.bool else part[rows].float() for part in text)


def micro_conditions(batch: BatchLike) -> Tensor | None:
    """int64 [b, 6] of a batch whose sizes were asked for: height and width of the original, top and left of the crop
    once it has the size of the bucket, the bucket's height and width (Podell et al. 2023, section 2.2).
    """
    if batch.sizes is None:
        return None
    stored, target = batch.sizes.astype(np.int64), np.array([int(side) for side in batch.bucket.split("x")])
    crop = np.rint(stored[:, 2:4] * (target / stored[:, 4:6])).astype(np.int64)
    return torch.from_numpy(np.concatenate([stored[:, :2], crop, np.broadcast_to(target, crop.shape)], axis=1))


def copied(batch: BatchLike, device: torch.device) -> DeviceBatch:
    """The batch on a device; the host waits for no copy to a GPU, for it is made from pinned memory."""

    def copy(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    text, sizes = batch.text, micro_conditions(batch)
    return DeviceBatch(
        batch,
        latents=copy(stored_values(batch.latents)),
        ids=copy(ids_from_words(batch.sample_ids)),
        labels=None if batch.labels is None else copy(torch.from_numpy(batch.labels)),
        text=None if text is None else tuple(copy(stored_values(part)) for part in text),
        sizes=None if sizes is None else copy(sizes),
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
