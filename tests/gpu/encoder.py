"""The encoder: against a CPU, short of memory, and how fast it is."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.codec.codec import load_codec
from pipeline.codec.config import CodecConfig
from pipeline.encode.encoder import Encoder
from pipeline.encode.rows import Decoded, EncodedImage
from tests.benchmarks.decode import as_jpeg, mosaic
from tests.benchmarks.device_feed import feed, size_of
from tests.benchmarks.gpu import encode as rates
from tests.benchmarks.photographs import made_up
from tests.gpu.ground import Ground, Lines

# Of float32 with TF32 off: sums in another order, some hundred layers deep. Relative to the latents' deviation.
CPU_TOLERANCE = 1e-3
# A smaller batch may be computed by other kernels: the same, in bfloat16.
HALVED_TOLERANCE = 0.05


def against_cpu(ground: Ground) -> Lines:
    """In float32, from three threads at once: the same latents as on a CPU, each with its own row."""
    path, side = str(ground.codec()), ground.side
    # Convolutions in TF32 would be another arithmetic than the CPU's.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    items = rates.make_items(12, 12, side)
    found = {
        name: _encoded(path, items, device=device, dtype="float32", calls=calls)
        for name, device, calls in (("cpu", "cpu", 1), ("device", str(ground.device), 3))
    }
    worst = _difference(found["device"], found["cpu"])
    assert worst <= CPU_TOLERANCE, f"latents differ by {worst:.2g} of their deviation, more than {CPU_TOLERANCE:g}"
    return {"": {"largest difference, of the deviation": worst, "tolerance": CPU_TOLERANCE}}


def _encoded(
    path: str, items: Sequence[Decoded], *, device: str, dtype: str, calls: int = 1, batch: int = 4
) -> np.ndarray:
    """The latents of the items in row order, float16 [n, ...], handed in by so many threads."""
    codec = load_codec(path, device=device, dtype=dtype)
    side = items[0].pixels.shape[0]
    encoder = Encoder(codec, "mode", "float16", batch, side * side, "memory://check", device=device, calls=calls)
    outcomes: list[Any] = []
    threads = [
        threading.Thread(target=lambda part=items[n::calls]: outcomes.extend(encoder.encode(part)))
        for n in range(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == len(items), f"{len(items)} images in, {len(outcomes)} outcomes"
    assert all(isinstance(outcome, EncodedImage) for outcome in outcomes), outcomes
    ordered = sorted(outcomes, key=lambda outcome: outcome.place)
    return np.stack([np.frombuffer(o.latent, "<f2").reshape(o.shape).astype(np.float64) for o in ordered])


def _difference(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(ours - reference).max() / reference.std())


def short_of_memory(ground: Ground) -> Lines:
    """A batch that does not fit is halved until one does, and its latents are those of a batch that fits."""
    if ground.rehearsal:
        return {"": {"left out": "a CPU's memory has no fraction to give"}}
    path, side, batch = str(ground.codec()), 512, 64
    items = rates.make_items(batch, batch, side)
    settings = {"device": "cuda", "dtype": "bfloat16"}
    reference = _encoded(path, items, batch=8, **settings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    _encoded(path, items, batch=16, **settings)
    # Room for sixteen and a little, not for sixty-four.
    share = 1.3 * torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(share)
    codec = load_codec(path, **settings)
    encoder = Encoder(codec, "mode", "float16", batch, side * side, "memory://check", device="cuda")
    outcomes = encoder.encode(items)
    assert encoder.usage.halvings, f"{batch} images of {side} px fit {share:.1%} of the memory: nothing was halved"
    assert encoder.usage.rejected == 0, f"{encoder.usage.rejected} images were rejected for want of memory"
    halved = np.stack([np.frombuffer(o.latent, "<f2").reshape(o.shape).astype(np.float64) for o in outcomes])  # type: ignore[union-attr]
    worst = _difference(halved, reference)
    assert worst <= HALVED_TOLERANCE, f"latents differ by {worst:.2g} of their deviation"
    return {"": {"halvings": float(encoder.usage.halvings), "largest difference, of the deviation": worst}}


def encode_rates(ground: Ground, *, compiled: bool = False) -> Lines:
    """The product's encoder beside the bare VAE, by codec and size."""
    scale = ground.scale
    scale = replace(scale, rounds=2, encode_batches=min(4, scale.encode_batches))
    if compiled:
        scale = replace(scale, codecs=dict(list(scale.codecs.items())[:1]))
    rows = list(rates.figures(ground.bench(compiled=compiled), scale))
    assert rows, "no codec could be measured"
    wanted = ("batch", "images_per_s", "of_bare", "of_measured_peak", "of_datasheet_peak", "device_busy")
    return {f"{row['codec']} {row['side']} px": {name: row[name] for name in wanted} for row in rows}


def encode_rates_compiled(ground: Ground) -> Lines:
    """The same, compiled."""
    return encode_rates(ground, compiled=True)


def encode_fed(ground: Ground) -> Lines:
    """The job's actor on JPEGs of a megapixel: images/s and the device's busy share, on this machine's cores."""
    path, cores = str(ground.codec()), os.cpu_count() or 1
    sides = {32: 4} if ground.rehearsal else {256: 128, 512: 32, 1024: 8}
    jpeg = ground.place / "picture.jpg"
    jpeg.write_bytes(as_jpeg(mosaic(made_up(24), *size_of(0.3 if ground.rehearsal else 1.0))))
    codec = CodecConfig(path=path, dtype="float32" if ground.rehearsal else "bfloat16")
    seconds = 1.0 if ground.rehearsal else 6.0
    return {
        f"{side} px": {
            "batch": float(batch),
            "cores": float(cores),
            **feed(codec, jpeg, side, cores, batch, seconds, device=str(ground.device)),
        }
        for side, batch in sides.items()
    }
