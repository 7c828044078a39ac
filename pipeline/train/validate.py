"""Validation loss on fixed samples, stratified timesteps and fixed noise: the same question at every visit.

Sample i is asked at t = (j + u_i) / T for j < T, with u_i and the noise keyed by its id, so two visits differ by
the weights alone; chunks of fixed shape are dealt to ranks, so the answer does not depend on the world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.rng import keyed_normal, keyed_uniform
from pipeline.train import world
from pipeline.train.state import TrainState
from pipeline.train.task import Forward, Task, Text

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Chunk:
    """Samples of one latent shape: raw latents [n, c, h, w], ids int64 [n, 2], labels [n] or None, text or None."""

    latents: Tensor
    ids: Tensor
    labels: Tensor | None
    text: Text | None = None


@dataclass(frozen=True)
class Validation:
    """The fixed question; every rank holds all chunks and answers its share. ema: track names asked besides raw."""

    task: Task
    forward: Forward
    chunks: Sequence[Chunk]
    num_timesteps: int
    ema: Sequence[str] = ()
    device: torch.device = _CPU
    precision: str = "fp32"

    @torch.no_grad()
    def run(self, state: TrainState) -> dict[str, float]:
        """{"val/loss": mean, "val/loss_t<j>": mean of stratum j, and the same under "val/<track>/"}."""
        out: dict[str, float] = {}
        was_training = state.model.training
        state.model.eval()
        for name in (None, *self.ema):
            prefix = "val" if name is None else f"val/{name}"
            with state.ema.swapped(state.params, name):
                by_stratum = self._losses().mean(dim=0)
            out[f"{prefix}/loss"] = float(by_stratum.mean())
            out |= {f"{prefix}/loss_t{j}": float(v) for j, v in enumerate(by_stratum)}
        state.model.train(was_training)
        return out

    def _losses(self) -> Tensor:
        """Loss of every sample at every stratum, float64 [samples, T], the same on every rank."""
        ranks, rank = world.world_size(), world.rank()
        count = len(self.chunks)
        starts = [0]
        for chunk in self.chunks:
            starts.append(starts[-1] + len(chunk.ids))
        losses = torch.zeros(starts[-1], self.num_timesteps, dtype=torch.float64)
        # Under FSDP every forward is a collective: each rank makes as many, the surplus ones are thrown away.
        for first in range(0, count, ranks):
            index = first + rank
            chunk = self.chunks[min(index, count - 1)]
            for j in range(self.num_timesteps):
                value = self._ask(chunk, j)
                if index < count:
                    losses[starts[index] : starts[index + 1], j] = value.double().cpu()
        return world.total(losses)

    def _ask(self, chunk: Chunk, stratum: int) -> Tensor:
        task, ids = self.task, chunk.ids.to(self.device)
        x0 = task.clean(chunk.latents.to(self.device), ids, 0)
        u = keyed_uniform(task.seed, ids, purpose="validate/timestep")
        t = (stratum + u) / self.num_timesteps
        noise = keyed_normal(task.seed, ids, purpose="validate/noise", counter=stratum, shape=x0.shape[1:])
        labels = None if chunk.labels is None or task.num_classes is None else chunk.labels.to(self.device)
        text = None if chunk.text is None else (chunk.text[0].to(self.device), chunk.text[1].to(self.device))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return task.losses(self.forward, x0, noise, t, labels, text)
