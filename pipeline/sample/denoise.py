"""Requests to raw latents: the diffusion model's half of sampling. Knows torch and no ray.

Every batch has the same number of rows, the last one padded, and noise is keyed by request id: on a CPU a
request's latent is bit for bit the same whatever is drawn beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.rng import ids_from_bytes, keyed_normal
from pipeline.diffusion.samplers import Conditioning, sample
from pipeline.model.export import ExportInfo, load_export
from pipeline.sample.plan import padded, shape_groups
from pipeline.sample.provenance import Draw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOISE = "sample noise"  # the purpose that keys a request's noise; changing it changes every image


@dataclass(frozen=True)
class Schedule:
    """What all rows of one batch share: image size in pixels, solver steps, guidance and where it acts."""

    height: int
    width: int
    steps: int
    guidance: float
    interval: tuple[float, float]


class Denoiser:
    """A loaded export that draws tables of requests in batches of `draw.batch_size` rows.

    On a CPU the bits of a latent also depend on the number of threads torch computes with: whoever makes the
    process sets it (`use_threads`).
    """

    def __init__(self, model: nn.Module, info: ExportInfo, draw: Draw, *, compile: bool = False) -> None:
        self.info, self.how = info, draw
        self.device, self.dtype = torch.device(draw.device), DTYPES[draw.dtype]
        self._objective = Objective.from_dict(info.objective)
        self._model = model.requires_grad_(False).eval().to(self.device)
        if compile:
            self._model.compile(dynamic=False)
        shape = (1, info.latent_channels, 1, 1)
        self._mean = torch.tensor(info.latent_mean, dtype=torch.float32, device=self.device).reshape(shape)
        self._std = torch.tensor(info.latent_std, dtype=torch.float32, device=self.device).reshape(shape)

    @classmethod
    def load(cls, model_uri: str, draw: Draw, *, compile: bool = False) -> Denoiser:
        """The denoiser of an export; InputError when it is missing, damaged or not what it says."""
        model, info = load_export(model_uri)
        return cls(model, info, draw, compile=compile)

    def __call__(self, requests: pa.Table, on_batch: Callable[[int], None] | None = None) -> pa.Table:
        """The table with columns `latent` (float32 bytes, C order, raw) and `latent_shape` ([c, h, w]) added.

        A latent that is not finite is null. Rows may mix shapes; their order is kept. `on_batch` hears of the
        rows finished.
        """
        names = requests["request_id"].to_pylist()
        labels = requests["label"].to_pylist()
        latents: list[bytes | None] = [None] * requests.num_rows
        shapes: list[list[int]] = [[]] * requests.num_rows
        for group in shape_groups(requests):
            schedule = schedule_of(requests.slice(int(group[0]), 1))
            for batch, num_real in padded(group, self.how.batch_size):
                drawn = self.draw_batch([names[i] for i in batch], [labels[i] for i in batch], schedule)
                drawn_NCHW = drawn[:num_real].cpu().numpy()
                for index, latent in zip(batch[:num_real], drawn_NCHW, strict=True):
                    shapes[index] = list(latent.shape)
                    latents[index] = latent.tobytes() if np.isfinite(latent).all() else None
                if on_batch is not None:
                    on_batch(num_real)
        table = requests.append_column("latent", pa.array(latents, pa.large_binary()))
        return table.append_column("latent_shape", pa.array(shapes, pa.list_(pa.int32(), 3)))

    @torch.no_grad()
    def draw_batch(self, names: Sequence[bytes], labels: Sequence[int | None], schedule: Schedule) -> Tensor:
        """Raw latents, float32 [n, c, h/f, w/f] on the device, of n requests with one schedule, in one batch."""
        shape = (self.info.latent_channels, schedule.height // self.info.factor, schedule.width // self.info.factor)
        # Noise comes from the CPU whatever the device, so that it is the same everywhere.
        noise = keyed_normal(self.how.seed, ids_from_bytes(names), purpose=NOISE, shape=shape).to(self.device)
        cond, uncond = self._conditioning(labels)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            normalised = sample(
                self._model,
                noise,
                objective=self._objective,
                sampler=self.how.sampler,
                steps=schedule.steps,
                cond=cond,
                uncond=uncond,
                guidance=schedule.guidance,
                guidance_interval=schedule.interval,
                shift=self.how.shift,
            )
        return normalised.float() * self._std + self._mean

    def _conditioning(self, labels: Sequence[int | None]) -> tuple[Conditioning, Conditioning]:
        if self.info.num_classes is None:
            return {}, {}
        no_label = self.info.num_classes
        known = torch.tensor([no_label if n is None else n for n in labels], dtype=torch.int64, device=self.device)
        return {"labels_B": known}, {"labels_B": torch.full_like(known, no_label)}


def schedule_of(row: pa.Table) -> Schedule:
    """The schedule of a one-row requests table."""
    request = row.to_pylist()[0]
    low, high = request["guidance_low"], request["guidance_high"]
    interval = (0.0 if low is None else low, 1.0 if high is None else high)
    return Schedule(request["height"], request["width"], request["steps"], request["guidance"], interval)


def use_threads(threads: int) -> None:
    """Let torch compute with this many CPU threads in this process: sums in another order have other last bits."""
    torch.set_num_threads(threads)
