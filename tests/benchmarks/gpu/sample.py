"""Sampling: the product's denoiser and decoder from requests to pixels, and a plain loop over the same modules."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from torch import nn

from pipeline.codec.codec import decode_flops
from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.rng import id_from_text
from pipeline.sample.denoise import Denoiser, LatentDecoder
from pipeline.sample.provenance import Draw
from pipeline.sample.requests import REQUEST_SCHEMA
from tests.benchmarks.gpu.device import Bench, Kernels, fitting, medians
from tests.benchmarks.gpu.encode import make_vae
from tests.benchmarks.gpu.shapes import Dit, Scale
from tests.benchmarks.gpu.train import as_trained, forward_flops, make_dit

HEADS = {
    "model": "model + codec",
    "side": "px",
    "compile": "compile",
    "batch": "batch",
    "images_per_s": "images/s",
    "bare_images_per_s": "bare loop",
    "of_bare": "of bare",
    "of_measured_peak": "of measured peak",
    "of_datasheet_peak": "of data sheet",
    "device_busy": "device busy",
    "peak_memory_gib": "peak GiB",
}


class Network(NamedTuple):
    """What a Denoiser reads of a network's configuration."""

    micro_conditions: bool = False
    distilled: bool = False


@dataclass(frozen=True)
class ModelFacts:
    """What a Denoiser reads of a ModelInfo."""

    objective: Objective
    latent_channels: int
    num_classes: int
    factor: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    model: Network


def figures(bench: Bench, scale: Scale) -> Iterator[dict[str, Any]]:
    """One row an image size and form."""
    model_name, codec_name = scale.sampled
    size = scale.models[model_name]
    with tempfile.TemporaryDirectory(prefix="latentloom-bench-") as folder:
        make_vae(bench, scale.codecs[codec_name]).cpu().float().save_pretrained(folder, safe_serialization=True)
        for compiled in bench.compiled:
            with bench.device:
                model = as_trained(make_dit(size))
            for side, batch in scale.sample.items():
                case = {"model": f"{model_name} + {codec_name}", "side": side, "compile": compiled}
                attempt = partial(measure, bench, scale, size, model, folder, compiled, side)
                found = fitting(bench, f"sample {side} px", batch, attempt)
                if found is not None:
                    yield {**case, "batch": found[0], **found[1]}
            del model, attempt
            bench.release()


def measure(
    bench: Bench, scale: Scale, size: Dit, model: nn.Module, folder: str, compiled: bool, side: int, batch: int
) -> dict[str, Any]:
    """Both sides on one batch."""
    draw = Draw(
        seed=0,
        sampler="euler",
        shift=1.0,
        batch_size=batch,
        device=str(bench.device),
        threads=torch.get_num_threads(),
        dtype=bench.dtype,
        image="png",
        quality=95,
    )
    decoder = LatentDecoder(folder, batch_size=batch, device=str(bench.device), dtype=bench.dtype)
    factor = decoder.codec.info.factor
    ends = ((0.0,) * size.channels, (1.0,) * size.channels)
    about: Any = ModelFacts(Objective("flow"), size.channels, size.classes, factor, *ends, Network())
    denoiser = Denoiser(model, about, draw, compile=compiled)
    requests = make_requests(scale, size, side, batch)
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=bench.torch_dtype, low_cpu_mem_usage=False)
    vae.to(bench.device, memory_format=torch.channels_last)

    def product() -> None:
        found = decoder(denoiser(requests))
        assert found["pixels"].null_count == 0

    bench.start_memory()
    work = {"product": product, "bare": lambda: bare(bench, scale, size, model, vae, side // factor, batch)}
    seconds = medians(bench, scale.sample_rounds, work)
    memory = bench.peak_memory_gib()
    kernel_s = Kernels(bench).during(product)
    denoising = 2 * scale.solver_steps * forward_flops(size, side // factor)  # guidance asks the model twice
    flops = denoising + (decode_flops(decoder.codec.info, side, side) or 0)
    rate, limit = batch / seconds["product"], batch / seconds["bare"]
    return {
        "solver_steps": scale.solver_steps,
        "guidance": scale.guidance,
        "images_per_s": rate,
        "bare_images_per_s": limit,
        "of_bare": rate / limit,
        "flops_per_image": flops,
        **bench.shares(rate * flops),
        "device_busy": None if kernel_s is None else kernel_s / seconds["product"],
        "peak_memory_gib": memory,
    }


def make_requests(scale: Scale, size: Dit, side: int, count: int) -> pa.Table:
    """`count` requests of one shape and schedule."""
    same = {"height": side, "width": side, "steps": scale.solver_steps, "guidance": scale.guidance, "seed": 0}
    rows = [{"request_id": id_from_text(str(i)), "label": i % size.classes, **same} for i in range(count)]
    return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)


@torch.no_grad()
def bare(
    bench: Bench, scale: Scale, size: Dit, model: nn.Module, vae: AutoencoderKL, latent_side: int, batch: int
) -> None:
    """Noise, Euler steps with guidance, the VAE, uint8 pixels on the host."""
    x = torch.randn(batch, size.channels, latent_side, latent_side, device=bench.device)
    labels = torch.arange(batch, device=bench.device) % size.classes
    labels = torch.cat([labels, torch.full_like(labels, size.classes)])
    times = torch.linspace(1, 0, scale.solver_steps + 1).tolist()
    with bench.autocast():  # around all steps: it casts each weight once
        for t, after in pairwise(times):
            twice = model(torch.cat([x, x]), torch.full((2 * batch,), t, device=bench.device), labels_B=labels)
            wanted, other = twice.float().chunk(2)
            x = x + (after - t) * (other + scale.guidance * (wanted - other))
    latents = x.to(bench.torch_dtype).contiguous(memory_format=torch.channels_last)
    pixels = vae.decode(latents, return_dict=False)[0].float()
    pixels.add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8).cpu()
