"""Fit a small AutoencoderKL to images: L1 + MSE + a little KL, AdamW, warm-up and decay. Torch only.

After Rombach et al. 2022 (latent diffusion), without the perceptual and adversarial terms: those need a
second trained network, and for small plain images the pixel losses are enough.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pipeline.codec.config import FitConfig
from pipeline.errors import ConfigError, InputError
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.pixels.prepare import Reject, prepare
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import EndOfUnit, Entry

# -- A keyed choice of images of a source, as one uint8 array to fit on ----------------------------------------


_ENTRIES_PER_READ = 64
_MIN_IMAGES = 5


@dataclass(frozen=True)
class FitImages:
    """uint8 [n,h,w,3] to fit on and held out, rejects by reason, and a digest of what was chosen."""

    train: npt.NDArray[np.uint8]
    holdout: npt.NDArray[np.uint8]
    rejects: dict[str, int]
    digest: str


def collect_images(source: SourceConfig, image: ImageConfig, count: int, holdout: int, seed: int) -> FitImages:
    """Up to `count` images to fit on and `holdout` (at most a fifth) kept aside, as the hash of (seed, key) says.

    So neither the order of the listing nor a directory per class decides. Memory holds the chosen images and
    as many entries. InputError when fewer than five images can be decoded.
    """
    wanted, side = count + holdout, image.resolutions[0]
    pixels = np.empty((wanted, side, side, 3), np.uint8)
    rejects: Counter[str] = Counter()

    def rank(entry: Entry) -> bytes:
        text = f"{seed}\0{entry.key}\0{entry.row_start}"
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()

    # Twice as many entries as images: some may be rejected.
    entries = heapq.nsmallest(2 * wanted, list_entries(source), key=rank)
    decoded = 0
    for array in itertools.islice(_decoded(source, image, entries, rejects), wanted):
        pixels[decoded] = array
        decoded += 1
    if decoded < _MIN_IMAGES:
        reasons = ", ".join(f"{n} {reason}" for reason, n in rejects.most_common()) or "nothing rejected"
        raise InputError(
            f"The source gives {decoded} usable images ({reasons})",
            key="source.uri",
            value=source.uri,
            rule=f"fitting a codec needs at least {_MIN_IMAGES}",
            next_step="name a source with more images, or relax the limits under image",
        )
    aside = min(holdout, decoded // _MIN_IMAGES)
    digest = hashlib.blake2b(pixels[:decoded].data, digest_size=16).hexdigest()
    return FitImages(pixels[aside:decoded], pixels[:aside], dict(rejects), digest)


def _decoded(
    source: SourceConfig, image: ImageConfig, entries: Sequence[Entry], rejects: Counter[str]
) -> Iterator[npt.NDArray[np.uint8]]:
    for start in range(0, len(entries), _ENTRIES_PER_READ):
        for row in read_unit(source, entries[start : start + _ENTRIES_PER_READ], [(0, None)]):
            if isinstance(row, EndOfUnit):
                continue
            prepared = prepare(row, image)
            if isinstance(prepared, Reject):
                rejects[prepared.reason.value] += 1
            else:
                yield prepared[0].pixels


# Posterior log-variance at the start: at the usual 0 the draw's noise hides the untrained mean.
_INITIAL_LOGVAR = -6.0

Images = npt.NDArray[np.uint8]  # [n,h,w,3]


@dataclass(frozen=True)
class FitReport:
    """What was measured after the last step.

    `psnr_db` is over all held-out pixels at once, on 0..255, decoded to uint8; the latent statistics are
    per channel over the images fitted on (posterior modes), and `scaling_factor` is 1 / their overall std.
    """

    psnr_db: float
    loss: float
    scaling_factor: float
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    images_seen: int
    parameters: int


def fit_codec(
    images_NHWC: Images,
    holdout_NHWC: Images,
    fit: FitConfig,
    directory: Path,
    *,
    device: str = "cpu",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> FitReport:
    """Fit on uint8 images of one size, measure on the held-out ones, save in diffusers layout.

    The weights are a function of the images, the recipe and the number of threads. `on_step(step, figures)`
    is called after each optimiser step, from 1. ValueError when the sizes do not suit the recipe.
    """
    for name, array in (("images", images_NHWC), ("held-out images", holdout_NHWC)):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or len(array) == 0:
            raise ValueError(f"{name} must be uint8 [n,h,w,3], not {array.dtype} {list(array.shape)}")
        if array.shape[1] % fit.factor or array.shape[2] % fit.factor:
            raise ValueError(f"{name} of {array.shape[1]}x{array.shape[2]} are no multiple of {fit.factor}")
    vae = _build(fit, images_NHWC.shape[1]).to(device, memory_format=torch.channels_last)
    # Fused AdamW is one kernel instead of ten per tensor: a tenth of the step at this size.
    optimizer = torch.optim.AdamW(vae.parameters(), lr=fit.learning_rate, weight_decay=0.0, fused=True)
    images, order = torch.from_numpy(images_NHWC), _order(len(images_NHWC), fit)
    loss_value = math.nan
    vae.train()
    for step in range(1, fit.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, fit)
        batch = _pixels(images[next(order)], device)
        loss, figures = _loss(vae, batch, fit, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), fit.gradient_clip)
        optimizer.step()
        loss_value = float(loss.detach())
        if not math.isfinite(loss_value):
            raise ConfigError(
                f"The loss became {loss_value} at step {step}",
                key="fit.learning_rate",
                value=fit.learning_rate,
                next_step="lower it, or lower fit.gradient_clip",
            )
        if on_step is not None:
            on_step(step, {"loss": loss_value, "gradient_norm": float(norm), **figures})
    vae.eval()
    mean, std, overall = _latent_statistics(vae, images, fit.batch_size, device)
    psnr = _psnr(vae, torch.from_numpy(holdout_NHWC), fit.batch_size, device)
    vae.register_to_config(scaling_factor=1 / overall, force_upcast=False)
    vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(directory, safe_serialization=True)
    return FitReport(
        psnr_db=psnr,
        loss=loss_value,
        scaling_factor=1 / overall,
        latents_mean=mean,
        latents_std=std,
        images_seen=fit.steps * fit.batch_size,
        parameters=sum(p.numel() for p in vae.parameters()),
    )


def _build(fit: FitConfig, sample_size: int) -> Any:
    """A new AutoencoderKL whose initial weights depend on the seed alone."""
    from diffusers import AutoencoderKL

    depth = len(fit.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key(fit.seed, "weights", 0))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=fit.block_out_channels,
            layers_per_block=fit.layers_per_block,
            latent_channels=fit.latent_channels,
            norm_num_groups=fit.norm_groups,
            sample_size=sample_size,
            mid_block_add_attention=fit.mid_attention,
        )
    with torch.no_grad():
        vae.quant_conv.weight[fit.latent_channels :] = 0
        vae.quant_conv.bias[fit.latent_channels :] = _INITIAL_LOGVAR
    return vae


def _key(seed: int, purpose: str, counter: int) -> int:
    """63 bits that depend on what the randomness is for, not on what was drawn before."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{counter}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _order(count: int, fit: FitConfig) -> Iterator[torch.Tensor]:
    """Endless batches of row numbers: each epoch one keyed permutation, its remainder joined to the next."""
    pending, epoch = torch.empty(0, dtype=torch.int64), 0
    while True:
        while len(pending) < fit.batch_size:
            generator = torch.Generator().manual_seed(_key(fit.seed, "order", epoch))
            pending = torch.cat([pending, torch.randperm(count, generator=generator)])
            epoch += 1
        yield pending[: fit.batch_size]
        pending = pending[fit.batch_size :]


def _pixels(batch_NHWC: torch.Tensor, device: str) -> torch.Tensor:
    return batch_NHWC.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _loss(vae: Any, pixels: torch.Tensor, fit: FitConfig, step: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Reconstruction from one posterior draw, plus the KL to a unit normal per latent element."""
    posterior = vae.encode(pixels, return_dict=False)[0]
    generator = torch.Generator().manual_seed(_key(fit.seed, "posterior", step))
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    decoded = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
    l1, mse = F.l1_loss(decoded, pixels), F.mse_loss(decoded, pixels)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss = fit.l1_weight * l1 + fit.mse_weight * mse + fit.kl_weight * kl
    return loss, {"l1": float(l1.detach()), "mse": float(mse.detach()), "kl": float(kl.detach())}


@torch.inference_mode()
def _latent_statistics(
    vae: Any, images: torch.Tensor, batch: int, device: str
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Mean and std per channel, and the std over all elements, of the posterior modes; float64 sums."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in torch.split(images, batch):
        latents = vae.encode(_pixels(part, device), return_dict=False)[0].mode().double().cpu()
        count += latents[:, 0].numel()
        total = total + latents.sum(dim=(0, 2, 3))
        squares = squares + latents.square().sum(dim=(0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    overall = float((squares.mean() / count - mean.mean().square()).clamp_min(0).sqrt())
    return tuple(mean.tolist()), tuple(std.tolist()), overall


@torch.inference_mode()
def _psnr(vae: Any, images: torch.Tensor, batch: int, device: str) -> float:
    """PSNR in dB of mode-encoded, decoded, rounded images, over all pixels at once."""
    error = 0.0
    for part in torch.split(images, batch):
        decoded = vae.decode(vae.encode(_pixels(part, device), return_dict=False)[0].mode(), return_dict=False)[0]
        levels = decoded.add(1).mul(127.5).round_().clamp_(0, 255).permute(0, 2, 3, 1).cpu()
        error += float((levels.double() - part.double()).square().sum())
    return 10 * math.log10(255**2 / max(error / images.numel(), 1e-10))


def _learning_rate(step: int, fit: FitConfig) -> float:
    """Linear warm-up, a constant, then a linear decay over the last `decay_share` of the steps."""
    rise = step / fit.warmup_steps if fit.warmup_steps else 1.0
    fall = (fit.steps - step + 1) / max(1.0, fit.decay_share * fit.steps)
    return fit.learning_rate * min(1.0, rise, fall)
