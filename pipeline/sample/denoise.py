"""Requests to raw latents, and these to pixels: the networks' half of sampling. Knows torch and no ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.codec.codec import Codec, load_codec
from pipeline.dataflow.device_faults import DeviceFault, device_fault, out_of_memory
from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.samplers import Drawer, Embedding, Solving, Texts, compile_for_shapes, padded
from pipeline.errors import argument_keys
from pipeline.sample.provenance import Draw
from pipeline.sample.requests import shape_groups

if TYPE_CHECKING:
    from pipeline.model.info import ModelInfo


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Sizes of images, with and without guidance; beyond torch's own limit of eight the rest would not be compiled.
_COMPILED_SHAPES = 64
NOISE = "sample noise"  # the purpose that keys a request's noise; changing it changes every image


@dataclass(frozen=True)
class Schedule:
    """What all rows of one batch share: image size in pixels, solver steps, guidance and where it acts."""

    height: int
    width: int
    steps: int
    guidance: float
    interval: tuple[float, float]


class Embed(Protocol):
    """Prompts to their embeddings; away: as what guidance leads away from, which some models read in another way."""

    def __call__(self, prompts: Sequence[str], *, away: bool = False) -> Mapping[str, Embedding]: ...


class Denoiser:
    """A loaded model that draws tables of requests in batches of `draw.batch_size` rows.

    On a CPU the bits of a latent also depend on the number of threads torch computes with: whoever makes the
    process sets it (`use_threads`).
    """

    def __init__(
        self,
        model: nn.Module,
        info: ModelInfo,
        draw: Draw,
        *,
        embed: Embed | None = None,
        compile: bool | None = None,
    ) -> None:
        """`compile`: None does as the draw says."""
        self.info, self.draw, self._embed = info, draw, embed
        device, dtype = torch.device(draw.device), DTYPES[draw.dtype]
        # Autocast casts a weight once a batch only if it asks for gradients, else at each of the solver's steps.
        self._model = model.requires_grad_(dtype != torch.float32).eval().to(device)
        if draw.compile if compile is None else compile:
            compile_for_shapes(self._model, _COMPILED_SHAPES)
        self._drawer = Drawer(
            self._model,
            objective=Objective(**vars(info.objective)),
            mean_C=torch.tensor(info.latent_mean, dtype=torch.float32),
            std_C=torch.tensor(info.latent_std, dtype=torch.float32),
            num_classes=info.num_classes,
            seed=draw.seed,
            purpose=NOISE,
            device=device,
            dtype=dtype,
            factor=info.factor if info.model.micro_conditions else None,
            distilled=info.model.distilled,
        )

    @classmethod
    def load(cls, model_uri: str, draw: Draw, *, ema: str | None = None, embed: Embed | None = None) -> Denoiser:
        """The denoiser of a model as `read_model` finds it; InputError when it is missing, damaged or another."""
        from pipeline.model.load import load_model  # it reads every form of model; one in memory needs none

        model, info = load_model(model_uri, ema)
        return cls(model, info, draw, embed=embed)

    def __call__(self, requests: pa.Table, on_batch: Callable[[int], None] | None = None) -> pa.Table:
        """The table with columns `latent` (float32 bytes, C order, raw) and `latent_shape` ([c, h, w]) added.

        A latent that is not finite is null. Rows may mix shapes; their order is kept. `on_batch` hears of the
        rows finished.
        """
        names = requests["request_id"].to_pylist()
        labels = requests["label"].to_pylist()
        texts: Texts | None = None
        if self._embed is not None:  # a prompt that is not given is the empty one
            prompts = [text or "" for text in requests["prompt"].to_pylist()]
            away = [text or "" for text in requests["negative_prompt"].to_pylist()]
            toward, led = self._embed(list(dict.fromkeys(prompts))), self._embed(list(dict.fromkeys(away)), away=True)
            texts = [(toward[prompt], led[other]) for prompt, other in zip(prompts, away, strict=True)]
        latents: list[bytes | None] = [None] * requests.num_rows
        shapes: list[list[int]] = [[]] * requests.num_rows
        for group in shape_groups(requests):
            schedule = schedule_of(requests.slice(int(group[0]), 1))
            for batch, num_real in padded(group, self.draw.batch_size):
                drawn = self.draw_batch(
                    [names[i] for i in batch],
                    [labels[i] for i in batch],
                    schedule,
                    [texts[i] for i in batch] if texts else None,
                )
                drawn_NCHW = drawn[:num_real].cpu().numpy()
                for index, latent in zip(batch[:num_real], drawn_NCHW, strict=True):
                    shapes[index] = list(latent.shape)
                    latents[index] = latent.tobytes() if np.isfinite(latent).all() else None
                if on_batch is not None:
                    on_batch(num_real)
        table = requests.append_column("latent", pa.array(latents, pa.large_binary()))
        return table.append_column("latent_shape", pa.array(shapes, pa.list_(pa.int32(), 3)))

    def draw_batch(
        self,
        names: Sequence[bytes],
        labels: Sequence[int | None],
        schedule: Schedule,
        texts: Texts | None = None,
    ) -> Tensor:
        """Raw latents, float32 [n, c, h/f, w/f] on the device, of n requests with one schedule, in one batch."""
        factor, shift = self.info.factor, self.draw.shift
        shape = (self.info.latent_channels, schedule.height // factor, schedule.width // factor)
        if self.draw.shift_by_size:
            shift = self.info.shift_at(*shape[1:], schedule.steps)
        solving = Solving(self.draw.sampler, schedule.steps, schedule.guidance, schedule.interval, shift)
        return self._drawer(names, labels, texts, shape, solving)


def schedule_of(row: pa.Table) -> Schedule:
    """The schedule of a one-row requests table."""
    request = row.to_pylist()[0]
    low, high = request["guidance_low"], request["guidance_high"]
    interval = (0.0 if low is None else low, 1.0 if high is None else high)
    return Schedule(request["height"], request["width"], request["steps"], request["guidance"], interval)


def use_threads(threads: int) -> None:
    """Let torch compute with this many CPU threads in this process: sums in another order have other last bits."""
    torch.set_num_threads(threads)


# -- Raw latents to pixels: the codec's half of sampling. Knows torch and no ray -------------------------------


class LatentDecoder:
    """A codec that turns tables with `latent` into tables with `pixels`, in batches of `batch_size` rows."""

    def __init__(
        self,
        codec_path: str,
        *,
        batch_size: int,
        device: str = "cpu",
        dtype: str = "float32",
        kind: str = "auto",
        revision: str | None = None,
    ) -> None:
        with argument_keys("codec"):
            self.codec: Codec = load_codec(codec_path, revision=revision, kind=kind, device=device, dtype=dtype)
        self.batch_size = batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with `latent` and `latent_shape` replaced by `pixels` (uint8 bytes [h, w, 3]; null: reject)
        and `reason` (null, or why there are no pixels). Order is kept.
        """
        latents = table["latent"].to_pylist()
        shapes = [tuple(shape) for shape in table["latent_shape"].to_pylist()]
        pixels: list[bytes | None] = [None] * table.num_rows
        reasons: list[str | None] = ["non_finite_latent" if latent is None else None for latent in latents]
        for shape in sorted(set(shapes)):
            rows = np.asarray([i for i, s in enumerate(shapes) if s == shape and latents[i] is not None], np.int64)
            for batch, num_real in padded(rows, self.batch_size):
                self._decode_rows(batch, num_real, latents, shape, pixels, reasons)
        table = table.drop_columns(["latent", "latent_shape"])
        table = table.append_column("pixels", pa.array(pixels, pa.large_binary()))
        return table.append_column("reason", pa.array(reasons, pa.string()))

    def _decode_rows(
        self,
        batch: np.ndarray,
        num_real: int,
        latents: list[bytes | None],
        shape: tuple[int, ...],
        pixels: list[bytes | None],
        reasons: list[str | None],
    ) -> None:
        """Fill in pixels or reasons for the first `num_real` rows of a batch; one bad row costs only itself.

        DeviceFault when the codec fails on known content, too: then no row is to blame.
        """
        try:
            decoded_NHWC = self.decode([latents[i] or b"" for i in batch], shape)
        except (RuntimeError, ValueError) as error:
            if out_of_memory(error) or device_fault(error) is not None:
                raise  # no fault of a row: a smaller batch_size helps, or a new process
            if num_real == 1:
                # Latents of zeros, the mean of most codecs, can be decoded in this shape, or no row is to blame.
                try:
                    self.decode([bytes(4 * math.prod(shape))] * len(batch), shape)
                except Exception as fault:
                    raise DeviceFault(f"{type(fault).__name__}: {' '.join(str(fault).split())[:500]}") from fault
                reasons[batch[0]] = "decode_failed"
                return
            for index in batch[:num_real]:
                # Alone, yet in a batch of the same shape: its bits stay what they would have been.
                self._decode_rows(np.full_like(batch, index), 1, latents, shape, pixels, reasons)
            return
        for index, image_HWC in zip(batch[:num_real], decoded_NHWC, strict=False):
            pixels[index] = image_HWC.tobytes()

    @torch.no_grad()
    def decode(self, latents: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
        """uint8 [n, h, w, 3] of n raw latents given as float32 bytes of one shape [c, h, w]."""
        flat = np.frombuffer(b"".join(latents), dtype=np.float32, count=len(latents) * math.prod(shape))
        raw = torch.from_numpy(flat.reshape(len(latents), *shape).copy())
        images: np.ndarray = self.codec.decode(raw).cpu().numpy()
        return images
