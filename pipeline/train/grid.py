"""Pictures while training: the same seeds and classes at every visit, drawn from an average of the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codec.codec import load_codec
from pipeline.dataflow.device_faults import out_of_memory
from pipeline.diffusion.draw import Drawer, Embedding, Solving, Texts, padded
from pipeline.diffusion.rng import id_from_text
from pipeline.media.images import contact_sheet, encode_image
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
    """How a grid is drawn. shape: (c, h, w) of a latent.

    prompts: the prompt of each picture, and their embeddings; None for a model that reads no text.
    collective: every rank draws it (sharded models need that); otherwise rank 0 alone. precision: that of training.
    `show` gets the PNG bytes on rank 0.
    """

    task: Task
    ema: str
    images: int
    shape: tuple[int, int, int]
    solving: Solving
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
        with state.ema.swapped(state.params, self.ema):
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

    def classes(self) -> list[int] | None:
        """The class of each picture: they take turns."""
        return None if self.task.num_classes is None else [i % self.task.num_classes for i in range(self.images)]

    def _latents(self, state: TrainState) -> Tensor:
        task = self.task
        draw = Drawer(
            state.model,
            objective=task.objective,
            mean_C=task.mean,
            std_C=task.std,
            num_classes=task.num_classes,
            seed=task.seed,
            purpose="grid",
            device=self.device,
            dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32,
        )
        ids = [id_from_text(f"grid {i}") for i in range(self.images)]
        labels: Sequence[int | None] = self.classes() or [None] * self.images
        texts, parts = self._texts(), []
        for rows, num_real in padded(np.arange(self.images), min(self.images, _CHUNK)):
            drawn = draw(
                [ids[i] for i in rows],
                [labels[i] for i in rows],
                None if texts is None else [texts[i] for i in rows],
                self.shape,
                self.solving,
            )
            parts.append(drawn[:num_real])
        return torch.cat(parts)

    def _texts(self) -> Texts | None:
        """Each prompt, and the empty one that guidance leads away from."""
        if self.prompts is None or self.task.empty_text is None:
            return None
        (away,) = _embeddings(self.task.empty_text)
        return [(prompt, away) for prompt in _embeddings(self.prompts[1])]

    def _captions(self) -> list[str]:
        labels = self.classes()
        parts = [[] if labels is None else [f"class {labels[i]}"] for i in range(self.images)]
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


def _embeddings(text: Text) -> list[Embedding]:
    return [Embedding(values, mask, None) for values, mask in zip(*(part.numpy() for part in text), strict=True)]
