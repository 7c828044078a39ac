"""The dry run: how many images, files, bytes and GPU hours, and when precomputing pays. Writes nothing."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from pipeline.codec.flops import encode_flops
from pipeline.codec.info import CodecInfo, check_posterior, codec_info
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.summary import row_bytes, rows_per_write
from pipeline.errors import ConfigError
from pipeline.result import JobResult
from pipeline.source.pixels.render import bucket_sizes
from pipeline.source.reading.listing import list_entries
from pipeline.store.plan.plan import group_units

_log = logging.getLogger(__name__)

# Dense peaks in TFLOP/s from the manufacturer's data sheets (without sparsity): of bf16, of a T4 of fp16 instead.
PEAK_TFLOPS = {"T4": 65.0, "L4": 121.0, "A100": 312.0, "H100": 989.0, "H200": 989.0}
# Bytes of a stored row besides its latent, with page headers: ids, key, sizes, a short caption.
_ROW_OVERHEAD_BYTES = 250
_SHARD_BYTES = 384 << 20


@dataclass
class _Count:
    """What a listing says; images in tar files are guessed by their size."""

    objects: int = 0
    images: int = 0
    units: int = 0
    size_bytes: int = 0
    tars: int = 0
    tar_images: int = 0

    @property
    def all_images(self) -> int:
        return self.images + self.tar_images


def dry_run(config: EncodeJobConfig) -> JobResult:
    """Count the source and reckon cost and sizes; raises the same errors as the job would."""
    info = codec_info(config.codec.path, config.codec.revision, config.codec.kind)
    check_posterior(info, config.codec.posterior)
    count = _count(config)
    figures: dict[str, float] = {}
    lines = [_source_line(config, count), *_output_lines(config, info, count.all_images, figures)]
    each = _flops_per_image(config, info)
    if each is None:
        lines.append(f"VAE work   unknown for a {info.class_name}")
    else:
        lines += _device_lines(config, count.all_images * each, figures)
        lines += _epoch_lines(config, figures)
    for line in lines:
        _log.info("%s", line)
    counts = {
        "images": count.all_images,
        "units": count.units,
        "source_objects": count.objects,
        "source_bytes": count.size_bytes,
        "unknown_length": count.tars,
    }
    return JobResult("dry-run", counts, {"dataset": config.output.uri}, None, {}, figures)


def _count(config: EncodeJobConfig) -> _Count:
    count = _Count()
    for unit in group_units(list_entries(config.source), config.encode.unit_rows, config.encode.unit_bytes):
        count.units += 1
        for entry in unit:
            count.objects += 1
            count.size_bytes += entry.size_bytes
            if entry.row_stop is None:
                count.tars += 1
                count.tar_images += entry.size_bytes // config.estimate.tar_image_bytes
            else:
                count.images += entry.row_stop - entry.row_start
    return count


def _source_line(config: EncodeJobConfig, count: _Count) -> str:
    guessed = (
        f", {count.tar_images:,} of them guessed in {count.tars:,} files of unknown length at "
        f"{config.estimate.tar_image_bytes:,} bytes each (estimate.tar_image_bytes)"
    )
    return (
        f"source     {count.objects:,} objects, {count.size_bytes / 1e9:,.3f} GB, {count.all_images:,} images in "
        f"{count.units:,} units of work" + (guessed if count.tars else "")
    )


def _output_lines(config: EncodeJobConfig, info: CodecInfo, images: int, figures: dict[str, float]) -> list[str]:
    """Latents, bytes and files, also put into `figures`; every image is taken to be of the largest bucket."""
    per_row = row_bytes(config, info) + _ROW_OVERHEAD_BYTES
    latents = images * len(config.image.resolutions) * (2 if config.image.flip else 1)
    stored = latents * per_row
    figures["latents"], figures["stored_bytes"] = float(latents), float(stored)
    figures["files"] = float(math.ceil(latents / rows_per_write(config, info)))
    figures["files_compacted"] = float(math.ceil(stored / _SHARD_BYTES))
    return [
        f"output     {latents:,} latents of {per_row:,} bytes, {stored / 1e9:,.3f} GB",
        f"files      at least {figures['files']:,.0f} as written, about {figures['files_compacted']:,.0f} after "
        "compaction",
    ]


def _epoch_lines(config: EncodeJobConfig, figures: dict[str, float]) -> list[str]:
    """From which epoch on precomputing is ahead, per GPU type, with the formula; also put into `figures`.

    n epochs cost n * encode online and encode + n * read from stored latents, in GPU hours.
    """
    read = figures["stored_bytes"] / config.estimate.read_bytes_per_s / 3600
    figures["hours.read_epoch"] = read
    shown = []
    for name in _gpus(config):
        epochs = epochs_until_ahead(figures[f"hours.{name}"], read)
        if epochs is not None:
            figures[f"epochs.{name}"] = float(epochs)
        shown.append(f"{name} {'never' if epochs is None else f'{epochs:,}'}")
    return [
        "epochs     after which precomputing has cost less than encoding online in each: the smallest n with",
        f"           encode + n * read < n * encode, read = {read:,.4g} hours (stored bytes at "
        f"{config.estimate.read_bytes_per_s:,.4g} bytes/s, estimate.read_bytes_per_s):",
        f"  {', '.join(shown)}",
    ]


def epochs_until_ahead(encode: float, read: float) -> int | None:
    """The smallest n with encode + n * read < n * encode; None when reading costs no less than encoding."""
    return None if encode <= read else math.floor(encode / (encode - read)) + 1


def _device_lines(config: EncodeJobConfig, flops: float, figures: dict[str, float]) -> list[str]:
    """Hours, and cost where a price is given, per GPU type; also put into `figures`."""
    lines = [
        f"VAE work   {flops / 1e12:,.4g} TFLOP; at {config.estimate.utilisation:.0%} of the half-precision peak:"
    ]
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
    """FLOPs of all variants of one image (a bucket table counts with its mean); None for a plug-in's codec."""
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
            next_step="give the dense half-precision peak in estimate.peak_tflops",
        )
    return peaks
