"""Encoding: the product's Encoder and codec from host to host, and the bare VAE on a tensor that is there already."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from pipeline.codec.codec import CodecInfo, encode_flops
from pipeline.codec.diffusers_codec import DiffusersCodec
from pipeline.encode.encoder import Encoder
from pipeline.encode.rows import Decoded
from tests.benchmarks.gpu.device import Bench, Kernels, fitting, medians
from tests.benchmarks.gpu.shapes import Scale

HEADS = {
    "codec": "codec",
    "side": "px",
    "compile": "compile",
    "batch": "batch",
    "images_per_s": "images/s",
    "bare_images_per_s": "bare VAE",
    "of_bare": "of bare",
    "of_measured_peak": "of measured peak",
    "of_datasheet_peak": "of data sheet",
    "device_busy": "device busy",
    "peak_memory_gib": "peak GiB",
}


def figures(bench: Bench, scale: Scale) -> Iterator[dict[str, Any]]:
    """One row a codec, size and form."""
    for name, shape in scale.codecs.items():
        for compiled in bench.compiled:
            vae = make_vae(bench, shape)
            codec = DiffusersCodec(vae, info_of(vae), device=str(bench.device), dtype=bench.dtype, compile=compiled)
            for side, batch in scale.encode.items():
                case = {"codec": name, "side": side, "compile": compiled}
                what = f"encode {name} {side} px"
                found = fitting(bench, what, batch, partial(measure, bench, scale, vae, codec, side))
                if found is not None:
                    yield {**case, "batch": found[0], **found[1]}
            del vae, codec
            bench.release()


def make_vae(bench: Bench, shape: dict[str, Any]) -> AutoencoderKL:
    """A random VAE on the device; the codec that wraps it later compiles it and changes its memory order in place."""
    torch.manual_seed(0)
    with bench.device:
        vae = AutoencoderKL(**shape)
    return nn.Module.to(vae, bench.torch_dtype)  # diffusers' own `to` warns of layers that this class does not have


def info_of(vae: AutoencoderKL) -> CodecInfo:
    """What a codec of these weights says about itself."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return CodecInfo("AutoencoderKL", config, "", latent_channels=config["latent_channels"], factor=factor)


def measure(
    bench: Bench, scale: Scale, vae: AutoencoderKL, codec: DiffusersCodec, side: int, batch: int
) -> dict[str, Any]:
    """Both sides on as many images."""
    images = batch * scale.encode_batches
    items = make_items(batch, images, side)
    encoder = Encoder(codec, "mode", "float16", batch, side * side, "memory://benchmark", device=str(bench.device))
    with torch.inference_mode():  # a tensor from outside would make torch.compile build the network once more
        x = torch.empty(batch, 3, side, side, device=bench.device, dtype=bench.torch_dtype).uniform_(-1, 1)
        x = x.contiguous(memory_format=torch.channels_last)

    def product() -> None:
        encoder.encode(items)
        if encoder.usage.halvings:
            raise torch.OutOfMemoryError(f"the encoder halved its batch of {batch}: out of memory")
        if encoder.usage.rejected:
            raise RuntimeError(f"the encoder rejected {encoder.usage.rejected} of {images} images")

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(scale.encode_batches):
            vae.encode(x, return_dict=False)[0].mode()

    bench.start_memory()
    # The bare side first: where the network cannot run at all, the encoder would ask for it image by image.
    seconds = medians(bench, scale.rounds, {"bare": bare, "product": product})
    memory = bench.peak_memory_gib()
    kernel_s = Kernels(bench).during(product)
    flops = encode_flops(codec.info, side, side) or 0
    rate, limit = images / seconds["product"], images / seconds["bare"]
    return {
        "images_per_s": rate,
        "bare_images_per_s": limit,
        "of_bare": rate / limit,
        "flops_per_image": flops,
        **bench.shares(rate * flops),
        "bare_of_measured_peak": limit * flops / bench.peak,
        "device_busy": None if kernel_s is None else kernel_s / seconds["product"],
        "peak_memory_gib": memory,
    }


def make_items(distinct: int, count: int, side: int) -> list[Decoded]:
    """`count` future rows over `distinct` random images."""
    pixels = np.random.default_rng(0).integers(0, 256, (distinct, side, side, 3), dtype=np.uint8)
    known = {"unit": 0, "variant": 0, "bucket": f"{side}x{side}"}
    return [Decoded({**known, "row": row, "key": str(row)}, 1, pixels[row % distinct]) for row in range(count)]
