"""The dry run: how many images, files, bytes and GPU hours, and when precomputing pays. Writes nothing."""

from __future__ import annotations

import logging
import math

from pipeline.codec.flops import encode_flops
from pipeline.codec.info import CodecInfo, check_posterior, codec_info
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.summary import largest_area
from pipeline.errors import ConfigError
from pipeline.result import JobResult
from pipeline.source.listing import list_entries
from pipeline.source.render import bucket_sizes

_log = logging.getLogger(__name__)

# Dense bf16 peaks in TFLOP/s from the manufacturer's data sheets (without sparsity).
PEAK_TFLOPS = {"T4": 65.0, "L4": 121.0, "A100": 312.0, "H100": 989.0, "H200": 989.0}
# Bytes of a stored row besides its latent, with page headers: ids, key, sizes, a short caption.
_ROW_OVERHEAD_BYTES = 250
_SHARD_BYTES = 384 << 20


def dry_run(config: EncodeJobConfig) -> JobResult:
    """Count the source and reckon cost and sizes; raises the same errors as the job would."""
    info = codec_info(config.codec.path, config.codec.revision, config.codec.kind)
    check_posterior(info, config.codec.posterior)
    images, unknown, size = 0, 0, 0
    objects = 0
    for entry in list_entries(config.source):
        objects += 1
        size += entry.size_bytes
        if entry.row_stop is None:
            unknown += 1
        else:
            images += entry.row_stop - entry.row_start
    per_row = _bytes_per_row(config, info)
    variants = len(config.image.resolutions) * (2 if config.image.flip else 1)
    stored = images * variants * per_row
    each = _flops_per_image(config, info)
    lines = [
        f"source     {objects:,} objects, {size / 1e9:,.3f} GB, {images:,} images"
        + (f" and {unknown:,} tar files of unknown length" if unknown else ""),
        f"output     {images * variants:,} latents of {per_row:,} bytes, {stored / 1e9:,.3f} GB, "
        f"about {max(1, math.ceil(stored / _SHARD_BYTES)):,} files after compaction",
    ]
    figures: dict[str, float] = {"stored_bytes": float(stored)}
    if each is None:
        lines.append(f"VAE work   unknown for a {info.class_name}")
    else:
        lines += _device_lines(config, images * each, figures)
    lines.append(
        "epochs     encoding online costs the same VAE work in every epoch: precomputing is ahead from the second "
        "epoch on, and in the first when a latent is used more than once (several resolutions, flips, sweeps)"
    )
    for line in lines:
        _log.info("%s", line)
    counts = {"images": images, "source_objects": objects, "source_bytes": size, "unknown_length": unknown}
    return JobResult("dry-run", counts, {"dataset": config.output.uri}, None, {}, figures)


def _bytes_per_row(config: EncodeJobConfig, info: CodecInfo) -> int:
    channels = info.latent_channels * (2 if config.codec.posterior == "moments" else 1)
    return 2 * channels * largest_area(config.image) // info.factor**2 + _ROW_OVERHEAD_BYTES


def _device_lines(config: EncodeJobConfig, flops: float, figures: dict[str, float]) -> list[str]:
    """Hours, and cost where a price is given, per GPU type; also put into `figures`."""
    lines = [f"VAE work   {flops / 1e12:,.4g} TFLOP; at {config.estimate.utilisation:.0%} of the bf16 peak:"]
    figures["flops"] = flops
    for name, peak in _gpus(config).items():
        hours = flops / (peak * 1e12 * config.estimate.utilisation) / 3600
        figures[f"hours.{name}"] = hours
        price = config.estimate.price_per_hour.get(name)
        cost = f", cost {hours * price:,.2f}" if price is not None else ""
        lines.append(f"  {name:<8} {hours:,.4g} hours{cost}")
        if price is not None:
            figures[f"cost.{name}"] = hours * price
    return lines


def _flops_per_image(config: EncodeJobConfig, info: CodecInfo) -> float | None:
    """FLOPs of all variants of one image (a bucket table counts with its mean); None where no formula is known."""
    total = 0.0
    for resolution in config.image.resolutions:
        sizes = bucket_sizes(config.image, resolution)
        each = [encode_flops(info, h, w) for h, w in sizes]
        known = [f for f in each if f is not None]
        if len(known) < len(each):
            return None
        total += sum(known) / len(known)
    return total * (2 if config.image.flip else 1)


def _gpus(config: EncodeJobConfig) -> dict[str, float]:
    peaks = {**PEAK_TFLOPS, **config.estimate.peak_tflops}
    unknown = sorted(set(config.estimate.price_per_hour) - set(peaks))
    if unknown:
        raise ConfigError(
            f"There is a price for {', '.join(unknown)} but no peak rate",
            key="estimate.price_per_hour",
            value=unknown,
            rule=f"known GPUs are {', '.join(PEAK_TFLOPS)}",
            next_step="give the dense bf16 peak in estimate.peak_tflops",
        )
    return peaks
