"""A codec that takes a GPU's milliseconds for each batch and computes nothing: so what feeds it is seen anywhere.

`codec.kind=paced` and, for one TFLOP/s, `codec.path=tflops-1`: the rate at which its device works off the FLOPs of
Stable Diffusion's encoder (FLUX's is the same but for its last layer). Its latents are zeros. The waiting is a sleep,
without the interpreter's lock; the copy to the device, which costs no processor, takes no time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.codec.codec import CodecInfo, encode_flops
from pipeline.encode.encoder import DeviceQueue, Fetch
from tests.support.plugins import install_codec_plugin

_CHANNELS = (128, 256, 512, 512)
SD = CodecInfo(
    "AutoencoderKL",
    {
        "block_out_channels": _CHANNELS,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    weights_sha256="",
    latent_channels=4,
    factor=8,
)


@lru_cache
def flops(height: int, width: int) -> int:
    """Of encoding one image."""
    counted = encode_flops(SD, height, width)
    assert counted is not None
    return counted


class PacedQueue(DeviceQueue):
    """A device that is busy with a batch for a time that its size says, one batch after the other."""

    def __init__(self, flops_per_s: float) -> None:
        super().__init__("cpu")
        self.depth = 2  # as on CUDA
        self._flops_per_s, self._free_at = flops_per_s, 0.0

    def submit(self, batch: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> Fetch:
        """The answer comes when the device would have done this batch, after all before it."""
        images, height, width, _ = batch.shape
        seconds = images * flops(height, width) / self._flops_per_s
        latents = encode(batch).numpy()
        self._free_at = done = max(time.perf_counter(), self._free_at) + seconds

        def fetch() -> tuple[Any, float]:
            time.sleep(max(0.0, done - time.perf_counter()))
            return latents, seconds

        return fetch


class PacedCodec:
    """Latents of zeros from the paced device."""

    def __init__(self, info: CodecInfo, flops_per_s: float) -> None:
        self.info, self.queue = info, PacedQueue(flops_per_s)

    def encode(
        self, images_NHWC: torch.Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Zeros, float32 [n, c, h/f, w/f]."""
        return torch.zeros(len(images_NHWC), *self.info.latent_shape(*images_NHWC.shape[1:3]))

    def decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        """There is no way back."""
        raise NotImplementedError("a paced codec computes nothing")


def _read_info(path: str, revision: str | None) -> CodecInfo:
    return CodecInfo("Paced", {}, hashlib.sha256(path.encode()).hexdigest(), SD.latent_channels, SD.factor)


def _load(path: str, revision: str | None, info: CodecInfo, **options: Any) -> PacedCodec:
    return PacedCodec(info, float(path.removeprefix("tflops-")) * 1e12)


plugin = SimpleNamespace(read_info=_read_info, load=_load)


def install(site: Path) -> Path:
    """The plug-in `paced` below `site`, for PYTHONPATH."""
    return install_codec_plugin(site, "paced", "from tests.support.paced import plugin\n")
