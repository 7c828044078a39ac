"""Images per second of the sample job's graph against a bare denoise and decode loop; memory over 10,000 samples.

    python -m tests.benchmarks.sample_throughput [--images 480] [--rounds 2] [--many 10000] [--out DIR]

The model is a small DiT with guidance on latents of 8x8, the codec a small AutoencoderKL; both have random weights.

    bare     one process, a loop of batches of the same size: noise, the same solver, the codec; pixels are dropped.
             torch may use every core
    graph    the job, one denoise actor a core: requests read, denoised, decoded, encoded as PNG with provenance,
             committed, shown. It runs on a quarter of the images and on all of them; its rate is that of the images
             between, so that what starting up costs falls out of the difference

Ways take turns; a figure is the median of the rounds. The job does more (PNG, hashes, commits) on the same cores; the
aim is at least 0.9 of the bare loop. `--many` draws that many tiny images in one job and shows the private memory
(resident less shared) of the driver and of each of its Ray processes over time. `--rounds 0` and `--many 0` leave out
either half.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import validate
from pipeline.dataflow.cluster import ClusterConfig, ensure_ray, shutdown_ray
from pipeline.sample import job as sample_job
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.prepare import SamplingInputs, on_device, prepare
from tests.benchmarks.memory import MemoryWatch
from tests.benchmarks.report import bars, table, write

BATCH, STEPS, GUIDANCE = 16, 25, 2.0  # the steps are the job's default
CORES = os.cpu_count() or 1


def make_model(folder: Path, hidden: int, depth: int) -> Path:
    """A random class-conditional DiT of this size, exported with its codec (factor 4, images of 32x32)."""
    import torch

    from pipeline.codec.codec import codec_info
    from pipeline.diffusion.config import ObjectiveConfig
    from pipeline.model.config import DiTConfig
    from pipeline.model.info import CodecReference, ModelInfo
    from pipeline.model.load import build_model
    from pipeline.train.export import save_export
    from tests.support.images import make_codec

    codec_path = make_codec(folder / "codec")
    codec = codec_info(str(codec_path))
    config = DiTConfig(kind="dit", hidden=hidden, depth=depth, heads=hidden // 32, patch=2)
    torch.manual_seed(0)
    model = build_model(config, latent_channels=4, num_classes=10, text_dim=None)
    info = ModelInfo(
        model=config,
        objective=ObjectiveConfig(),
        latent_channels=4,
        num_classes=10,
        text_dim=None,
        factor=codec.factor,
        latent_mean=(0.0,) * 4,
        latent_std=(1.0,) * 4,
        codec=CodecReference(**codec.as_dict(), path=str(codec_path)),
        dataset={},
        fingerprint_digest="",
        run_id=None,
        images_seen=0,
        ema="raw",
        buckets=("32x32",),
    )
    save_export(folder / "export", model, info)
    return folder / "export"


def configured(model: Path, output: Path, images: int, **changes: Any) -> SampleJobConfig:
    base: dict[str, Any] = {
        "model": {"uri": str(model)},
        "output": {"uri": str(output), "contact": 0},
        "requests": {
            "kind": "grid", "classes": "all", "count": max(1, images // 10), "steps": STEPS, "guidance": GUIDANCE,
        },
        "batch_size": BATCH,
        "unit_requests": 2 * BATCH,
        "write": {"fragment_rows": 2 * BATCH},
        "denoise": {"actors": CORES},
        "tracking": {"enabled": False},
    }  # fmt: skip
    return validate(SampleJobConfig, {**base, **changes})


def bare(prepared: SamplingInputs, threads: int) -> float:
    """Images per second of the plain loop, its first batch left out."""
    import torch

    from pipeline.sample.denoise import Denoiser, LatentDecoder, schedule_of, use_threads

    use_threads(threads)
    table_ = prepared.requests.table
    names, labels = table_["request_id"].to_pylist(), table_["label"].to_pylist()
    schedule = schedule_of(table_.slice(0, 1))
    denoiser = Denoiser.load(prepared.model.uri, prepared.draw)
    codec = LatentDecoder(prepared.codec_path, batch_size=BATCH).codec
    began, done = 0.0, 0
    for start in range(0, len(names) - BATCH + 1, BATCH):
        if start == BATCH:
            began, done = time.perf_counter(), 0
        with torch.inference_mode():
            latents = denoiser.draw_batch(names[start : start + BATCH], labels[start : start + BATCH], schedule)
            codec.decode(latents)
        done += BATCH
    return done / (time.perf_counter() - began)


def graph(model: Path, folder: Path, images: int) -> float:
    """Images per second of the job beyond the first quarter of the images."""
    seconds = []
    for count in (images // 4, images):
        began = time.perf_counter()
        done = sample_job.run(configured(model, folder / str(count), count))
        seconds.append((time.perf_counter() - began, done.counts["images"]))
    (few_s, few), (many_s, many) = seconds
    return (many - few) / (many_s - few_s)


ROLES = {
    "DenoiseBlocks": "denoise actor",
    "DecodeBlocks": "decode actor",
    "EncodeImages": "encode task",
    "CommitImages": "write task",
    "ReadRequests": "read task",
}


def throughput(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    model = make_model(folder, hidden=192, depth=6)
    prepared = prepare(configured(model, folder / "none", images // 4))
    prepared = replace(prepared, draw=on_device(prepared.draw, "cpu"))
    figures: dict[str, list[float]] = {"bare, every core": [], "bare, one core": [], "ours: the job's graph": []}
    for number in range(rounds):
        figures["bare, every core"].append(bare(prepared, CORES))
        figures["ours: the job's graph"].append(graph(model, folder / f"round-{number}", images))
        figures["bare, one core"].append(bare(prepared, 1))
    return figures


def flat_memory(folder: Path, images: int) -> dict[str, Any]:
    """Memory of each role in ten parts of the job's time, and its growth from the third quarter to the last."""
    model = make_model(folder, hidden=32, depth=1)
    requests = {"kind": "grid", "classes": "all", "count": images // 10, "steps": 1, "guidance": 1.0}
    config = configured(model, folder / "many", images, requests=requests, unit_requests=64)
    with MemoryWatch(ROLES) as watch:
        began = time.monotonic()
        result = sample_job.run(config)
        seconds = time.monotonic() - began
    return {
        "images": result.counts["images"],
        "seconds": seconds,
        "samples": [[round(at, 1), {k: round(v, 1) for k, v in found.items()}] for at, found in watch.samples],
        "growth_mib": watch.growth_mib(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="latentloom-bench-") as scratch:
        ensure_ray(ClusterConfig(num_cpus=max(2, CORES), dashboard=False))
        sample_passes_keep_ray()
        try:
            report: dict[str, Any] = {"batch": BATCH}
            if options.rounds:
                report |= _compare(Path(scratch), options.images, options.rounds, options.out)
            if options.many:
                report["memory"] = memory = flat_memory(Path(scratch, "many"), options.many)
                print(f"\n{_memory_table(memory)}")
            write(options.out, "sample_throughput", report)
        finally:
            shutdown_ray()


def _compare(folder: Path, images: int, rounds: int, out: Path | None) -> dict[str, Any]:
    figures = throughput(folder, images, rounds)
    medians = {way: statistics.median(values) for way, values in figures.items()}
    ratio = medians["ours: the job's graph"] / medians["bare, every core"]
    rows = [[way, value, value / medians["bare, every core"]] for way, value in medians.items()]
    print(f"\n{table(['way', 'images/s', 'of bare'], rows)}\n\nratio {ratio:.3f} (aim: at least 0.9)")
    bars(out, "sample_throughput", "Sampling, images per second", medians, "images/s")
    return {"images_per_s": figures, "median": medians, "ratio": ratio}


def sample_passes_keep_ray() -> None:
    """Every job here shares the one Ray that `main` started and stops."""
    import pipeline.sample.passes

    pipeline.sample.passes.shutdown_ray = lambda: None


def _memory_table(memory: dict[str, Any]) -> str:
    samples = memory["samples"]
    roles = [role for role in memory["growth_mib"] if any(role in found for _, found in samples)]
    picked = [samples[len(samples) * i // 10] for i in range(10)] if len(samples) >= 10 else samples
    rows = [[f"{at:.0f} s", *[found.get(role, "-") for role in roles]] for at, found in picked]
    growth = [memory["growth_mib"][role] for role in roles]
    rows.append(["growth", *["-" if g is None else round(g, 1) for g in growth]])
    title = f"{memory['images']:,} images in {memory['seconds']:.0f} s; private MiB of the largest process of a role"
    return f"{title}\n{table(['time', *roles], rows)}"


if __name__ == "__main__":
    main()
