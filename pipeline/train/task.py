"""What one batch teaches: from raw latents and keyed randomness to a loss per sample, the same on any rank.

raw latents [b, c, h, w] --posterior draw, per-channel normalisation--> x0 --noise, t--> x_t
x_t, t, labels --model--> prediction --objective's target and weight--> loss [b]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.rng import keyed_normal, keyed_uniform
from pipeline.diffusion.timesteps import TimestepDensity

# (x_t [b, c, h, w], t [b], labels [b] or None[, text [b, l, d], its mask [b, l]]) -> prediction [b, c, h, w]
Forward = Callable[..., Tensor]
Text = tuple[Tensor, Tensor]  # embeddings [b, l, d], which of the l are tokens: bool [b, l]


def on_device(stored: np.ndarray, device: torch.device) -> Tensor:
    """Values as the stream gives them, on a device and in float32: what travels is what is stored.

    stored: float16, float32, or the bits of bfloat16 as uint16.
    """
    bits = stored.dtype == np.uint16
    tensor = torch.from_numpy(stored.view(np.int16) if bits else stored)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    tensor = tensor.to(device, non_blocking=True)
    return (tensor.view(torch.bfloat16) if bits else tensor).float()


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
    empty_text: Text | None = None

    def clean(self, raw_NCHW: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Normalised latents; where the posterior is stored, one draw of it per sample and epoch."""
        if self.moments:
            mean, log_variance = raw_NCHW.chunk(2, dim=1)
            noise = keyed_normal(self.seed, ids, purpose="posterior", counter=epoch, shape=mean.shape[1:])
            raw_NCHW = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
        shape = (1, -1, 1, 1)
        return (raw_NCHW - self.mean.to(raw_NCHW.device).view(shape)) / self.std.to(raw_NCHW.device).view(shape)

    def dropped_labels(self, labels: Tensor | None, ids: Tensor, epoch: int) -> Tensor | None:
        """Labels [b] of which a keyed share is replaced by the index that means "no label"."""
        if self.num_classes is None or labels is None:
            return None
        u = keyed_uniform(self.seed, ids, purpose="label", counter=epoch)
        return torch.where(u < self.label_dropout, torch.full_like(labels, self.num_classes), labels)

    def dropped_text(self, text: Text | None, ids: Tensor, epoch: int) -> Text | None:
        """Text of which a keyed share is replaced by the empty prompt; as far as shares agree, where labels go."""
        if self.empty_text is None or text is None:
            return None
        u = keyed_uniform(self.seed, ids, purpose="label", counter=epoch)
        drop, (embedding, mask) = u < self.text_dropout, self.empty_text
        return (
            torch.where(drop[:, None, None], embedding.to(text[0]), text[0]),
            torch.where(drop[:, None], mask.to(text[1]), text[1]),
        )

    def timesteps(self, ids: Tensor, epoch: int, latent_pixels: int) -> Tensor:
        """One timestep per sample and epoch."""
        u = keyed_uniform(self.seed, ids, purpose="time", counter=epoch)
        return self.density.times(u, latent_pixels=latent_pixels)

    def training_losses(
        self,
        forward: Forward,
        raw_NCHW: Tensor,
        ids: Tensor,
        labels: Tensor | None,
        epoch: int,
        text: Text | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(weighted loss [b] with gradients, timesteps [b]) of one micro-batch."""
        x0 = self.clean(raw_NCHW, ids, epoch)
        t = self.timesteps(ids, epoch, x0.shape[2] * x0.shape[3])
        noise = keyed_normal(self.seed, ids, purpose="noise", counter=epoch, shape=x0.shape[1:])
        labels, text = self.dropped_labels(labels, ids, epoch), self.dropped_text(text, ids, epoch)
        return self.losses(forward, x0, noise, t, labels, text), t

    def losses(
        self,
        forward: Forward,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        labels: Tensor | None,
        text: Text | None = None,
    ) -> Tensor:
        """Weighted mean squared error [b] of the prediction, in float32."""
        prediction = forward(self.objective.noisy(x0, noise, t), t, labels, *(text or ()))
        error = prediction.float() - self.objective.target(x0, noise, t).float()
        return error.square().mean(dim=(1, 2, 3)) * self.objective.weight(t)
