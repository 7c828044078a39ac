"""Floating-point operations of encoding and decoding one image, counted by running the codec on shapes alone.

Convolutions, linear layers and attention products count, two per multiply-add; norms, activations and resizing do
not (well under 1 %). The model lives on torch's meta device: no weights, no memory, no time.
"""

from __future__ import annotations

from pipeline.codec.info import DIFFUSERS_CLASSES, CodecInfo


def encode_flops(info: CodecInfo, height: int, width: int) -> int | None:
    """FLOPs to encode one height x width image; None for a plug-in's class, which is not built here."""
    info.latent_shape(height, width)
    return _count(info, "encode", (3, height, width))


def decode_flops(info: CodecInfo, height: int, width: int) -> int | None:
    """FLOPs to decode one latent to height x width pixels; None for a plug-in's class."""
    return _count(info, "decode", info.latent_shape(height, width))


def _count(info: CodecInfo, method: str, shape_CHW: tuple[int, int, int]) -> int | None:
    if info.class_name not in DIFFUSERS_CLASSES:
        return None
    # Only a dry run counts: the jobs that import this module answer --help and unchanged re-runs without torch.
    import diffusers
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        vae = getattr(diffusers, info.class_name).from_config(info.config).eval()
        with FlopCounterMode(display=False) as counter:
            getattr(vae, method)(torch.empty(1, *shape_CHW))
    return int(counter.get_total_flops())
