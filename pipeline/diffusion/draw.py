"""Batches of latents out of a trained model, drawn alike by the sample job, while training and in a notebook.

Noise is keyed by an id and a purpose and comes from the CPU, batches have one size, the last one padded: on a CPU a
latent is bit for bit the same whatever is drawn beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.rng import ids_from_bytes, keyed_normal
from pipeline.diffusion.samplers import Predict, sample


@dataclass(frozen=True)
class Embedding:
    """One prompt: states float32 [l, d]; which of them count, bool [l] (None: all); pooled float32 [p] or None."""

    text_LD: npt.NDArray[np.float32]
    mask_L: npt.NDArray[np.bool_] | None
    pooled_P: npt.NDArray[np.float32] | None

    @property
    def size_bytes(self) -> int:
        """Its size in a cache."""
        return self.text_LD.nbytes + (0 if self.pooled_P is None else self.pooled_P.nbytes)


Texts = Sequence[tuple[Embedding, Embedding]]  # of each row: its prompt, and what guidance leads away from


@dataclass(frozen=True)
class Solving:
    """How noise becomes latents: the arguments of `samplers.sample` of these names."""

    sampler: str = "auto"
    steps: int = 25
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0


@dataclass(frozen=True)
class Drawer:
    """A model that draws. mean, std: float32 [c], of raw latents; num_classes: None for a model without classes.

    seed, purpose: key the noise with each row's id; dtype: float32, or what autocast computes in. factor: image
    pixels per latent pixel, given where the model reads sizes. distilled: guidance is one of its inputs.
    """

    predict: Predict
    objective: Objective
    mean_C: Tensor
    std_C: Tensor
    num_classes: int | None
    seed: int
    purpose: str
    device: torch.device
    dtype: torch.dtype
    factor: int | None = None
    distilled: bool = False

    @torch.no_grad()
    def __call__(
        self,
        ids: Sequence[bytes],
        labels: Sequence[int | None],
        texts: Texts | None,
        shape: tuple[int, int, int],
        solving: Solving,
    ) -> Tensor:
        """Raw latents, float32 [n, *shape] on the device, of n rows in one batch; ids of 16 bytes."""
        noise = keyed_normal(self.seed, ids_from_bytes(ids), purpose=self.purpose, shape=shape)
        cond, uncond = self._conditioning(labels, texts)
        if self.factor is not None:
            # The whole of an original of the target's very size.
            height, width = (side * self.factor for side in shape[1:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).repeat(len(ids), 1)
            cond["sizes_B6"] = uncond["sizes_B6"] = sizes
        if self.distilled:
            cond["guidance_B"] = torch.full((len(ids),), solving.guidance, device=self.device)
            solving = replace(solving, guidance=1.0)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            normalised = sample(
                self.predict,
                noise.to(self.device),
                objective=self.objective,
                cond=cond,
                uncond=uncond,
                **vars(solving),
            )
        mean, std = (value.to(self.device).reshape(1, -1, 1, 1) for value in (self.mean_C, self.std_C))
        return normalised.float() * std + mean

    def _conditioning(
        self, labels: Sequence[int | None], texts: Texts | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cond: dict[str, Tensor] = {}
        uncond: dict[str, Tensor] = {}
        if self.num_classes is not None:
            rows = [self.num_classes if label is None else label for label in labels]
            cond["labels_B"] = torch.tensor(rows, dtype=torch.int64, device=self.device)
            uncond["labels_B"] = torch.full_like(cond["labels_B"], self.num_classes)
        if texts is not None:
            cond |= self._text_arguments([prompt for prompt, _ in texts])
            uncond |= self._text_arguments([away for _, away in texts])
        return cond, uncond

    def _text_arguments(self, rows: Sequence[Embedding]) -> dict[str, Tensor]:
        parts: dict[str, list[np.ndarray | None]] = {
            "text_BLD": [row.text_LD for row in rows],
            "text_mask_BL": [row.mask_L for row in rows],
            "pooled_BP": [row.pooled_P for row in rows],
        }
        return {
            name: torch.from_numpy(np.stack([array for array in arrays if array is not None])).to(self.device)
            for name, arrays in parts.items()
            if arrays[0] is not None
        }


def padded(indices: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of exactly `batch_size` indices and how many of them are real; the last is filled with its first.

    A fixed batch size keeps every kernel's shape, and so every bit of a row, apart from what else is drawn.
    """
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        filler = np.full(batch_size - len(part), part[0], dtype=part.dtype)
        yield np.concatenate([part, filler]), len(part)
