"""Pictures while training: the same seeds and classes at every visit, drawn from an average of the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.codec.codec import load_codec
from pipeline.dataflow.device_faults import out_of_memory
from pipeline.diffusion.rng import id_from_text, ids_from_bytes, keyed_normal
from pipeline.diffusion.samplers import sample
from pipeline.media.contact import contact_sheet
from pipeline.media.images import encode_image
from pipeline.train import world
from pipeline.train.state import TrainState
from pipeline.train.task import Task, Text

_CHUNK = 16
_DECODED_PIXELS = 1 << 20  # at a time: weights, optimiser and averages leave little room on the device
_CAPTION = 24  # letters shown of a prompt

_log = logging.getLogger(__name__)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class SampleGrid:
    """How a grid is drawn. shape: (c, h, w) of a latent; sampler: keyword arguments of `samplers.sample`.

    prompts: the prompt of each picture, and their embeddings; None for a model that reads no text.
    collective: every rank draws it (sharded models need that); otherwise rank 0 alone. precision: that of training.
    `show` gets the PNG bytes on rank 0.
    """

    task: Task
    ema: str
    images: int
    shape: tuple[int, int, int]
    sampler: dict[str, Any]
    codec: dict[str, Any]
    show: Callable[[TrainState, bytes], None]
    collective: bool = False
    prompts: tuple[tuple[str, ...], Text] | None = None
    device: torch.device = _CPU
    precision: str = "fp32"

    def run(self, state: TrainState) -> dict[str, float]:
        """Draw, decode on rank 0, show; no figures."""
        if world.rank() != 0 and not self.collective:
            return {}
        was_training = state.model.training
        state.model.eval()
        bf16 = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with state.ema.swapped(state.params, self.ema), bf16:
            latents = self._latents(state)
        state.model.train(was_training)
        if world.rank() == 0:
            try:
                sheet = self._sheet(latents)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                _log.warning("no pictures at step %d, memory ran out: %s", state.step, " ".join(str(error).split()))
            else:
                self.show(state, sheet)
        return {}

    def classes(self) -> Tensor | None:
        """The class of each picture: they take turns."""
        if self.task.num_classes is None:
            return None
        return torch.arange(self.images, device=self.device) % self.task.num_classes

    def _latents(self, state: TrainState) -> Tensor:
        ids = ids_from_bytes([id_from_text(f"grid {i}") for i in range(self.images)]).to(self.device)
        noise = keyed_normal(self.task.seed, ids, purpose="grid", shape=self.shape)
        labels, parts = self.classes(), []
        for first in range(0, self.images, _CHUNK):
            rows = slice(first, first + _CHUNK)
            cond, uncond = self._conditioning(rows, labels)
            parts.append(
                sample(
                    state.model,
                    noise[rows],
                    objective=self.task.objective,
                    cond=cond,
                    uncond=uncond,
                    **self.sampler,
                )
            )
        return self.task.raw(torch.cat(parts))

    def _conditioning(self, rows: slice, labels: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        cond: dict[str, Tensor] = {}
        uncond: dict[str, Tensor] = {}
        if labels is not None:
            cond["labels_B"] = labels[rows]
            uncond["labels_B"] = torch.full_like(labels[rows], self.task.num_classes or 0)
        if self.prompts is not None and self.task.empty_text is not None:
            names = ("text_BLD", "text_mask_BL")
            for name, values, empty in zip(names, self.prompts[1], self.task.empty_text, strict=True):
                cond[name] = values[rows].to(self.device)
                uncond[name] = empty.to(self.device).expand(cond[name].shape)
        return cond, uncond

    def _captions(self) -> list[str]:
        labels = self.classes()
        parts = [[] if labels is None else [f"class {int(labels[i])}"] for i in range(self.images)]
        if self.prompts is not None:
            for part, prompt in zip(parts, self.prompts[0], strict=True):
                part.append(prompt[:_CAPTION])
        return [", ".join(part) for part in parts]

    def _sheet(self, latents: Tensor) -> bytes:
        codec = load_codec(**self.codec, device=str(self.device), dtype="auto")
        height, width = (side * codec.info.factor for side in self.shape[1:])
        chunk = max(1, min(_CHUNK, _DECODED_PIXELS // (height * width)))
        pixels = torch.cat([codec.decode(latents[i : i + chunk]).cpu() for i in range(0, self.images, chunk)]).numpy()
        return contact_sheet([encode_image(p, {}) for p in pixels], self._captions())
