"""Mutated files of every kind through the decoder as it runs for a source nobody trusts: all of them in the sandbox.

`pytest tests/security -m soak -s` runs LATENTLOOM_FUZZ_COUNT of them (20,000) and prints the outcomes.
"""

from __future__ import annotations

import io
import os
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.source.config import ImageConfig
from pipeline.source.pixels import prepare as preparing
from pipeline.source.pixels.decode import sniff
from pipeline.source.pixels.prepare import Reject, prepare
from pipeline.source.reading.rows import SourceRow
from pipeline.source.reasons import Reason
from tests.security import hostile_images as hostile

pytestmark = pytest.mark.integration

CONFIG = ImageConfig(
    resolution=32, max_upscale=1e6, max_pixels=20_000_000, decode_cpu_s=5.0, decode_memory_mb=1024, isolate="all"
)
WORST_S = 60.0  # wall clock of one image: its CPU seconds, the start of a child, and a busy machine
GROWTH_MB = 200


def seeds() -> list[bytes]:
    """Small files of every format and of many codings, so that a mutation often hits something that matters."""
    picture = Image.effect_noise((64, 48), 60).convert("RGB")
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})]
    kinds += [("GIF", {}), ("BMP", {}), ("AVIF", {}), ("JPEG2000", {}), ("PPM", {})]
    kinds += [("TIFF", {"compression": c}) for c in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")]
    made = [hostile.encoded(kind, picture, **options) for kind, options in kinds]
    made.append(hostile.encoded("TIFF", picture.convert("1"), compression="group4"))
    made.append(hostile.encoded("TIFF", picture.convert("YCbCr"), compression="jpeg"))
    made.append(hostile.encoded("GIF", picture.convert("P")))
    made.append(hostile.png_of_profile(hostile.with_tags({b"A2B0": hostile.table_of_curves(256)})))
    made.append(hostile.webp_of_frames(2000))
    samples = np.asarray(picture)
    for options in (
        {"tile": (16, 16), "compression": "zstd"},
        {"planarconfig": "separate", "compression": "lzw", "predictor": True},
        {"bigtiff": True, "byteorder": ">", "compression": "deflate"},
        {"compression": "webp"},
        {"compression": "lerc"},
        {"compression": "lzma"},
    ):
        sink = io.BytesIO()
        stored = np.moveaxis(samples, 2, 0).copy() if "planarconfig" in options else samples
        tifffile.imwrite(sink, stored, photometric="rgb", metadata=None, **options)
        made.append(sink.getvalue())
    for grey in (samples[..., 0].astype(np.float32) / 255, samples[..., 0].astype(np.uint32) << 24):
        sink = io.BytesIO()
        tifffile.imwrite(sink, grey, metadata=None, compression="deflate", predictor=True)
        made.append(sink.getvalue())
    made += extras(picture)
    return made


def extras(picture: Image.Image) -> list[bytes]:
    """HEIC and JPEG XL, where their extras are installed."""
    made = []
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        made.append(hostile.encoded("HEIF", picture))
    except ImportError:
        pass
    try:
        import pillow_jxl  # noqa: F401

        made += [hostile.encoded("JXL", picture, lossless=lossless) for lossless in (False, True)]
    except ImportError:
        pass
    return made


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One of the usual accidents: changed bytes (often in the header), a cut, a hole, a doubled or foreign piece."""
    out = bytearray(data)
    kind = int(rng.integers(6))
    start = int(rng.integers(len(out)))
    if kind <= 1:
        reach = len(out) if kind else min(len(out), 200)
        for _ in range(int(rng.integers(1, 12))):
            out[int(rng.integers(reach))] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    elif kind == 2:
        del out[start:]
    elif kind == 3:
        del out[start : start + int(rng.integers(1, 64))]
    elif kind == 4:
        out[start:start] = out[max(0, start - int(rng.integers(1, 4096))) : start]
    else:
        out[start : start + 8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
    return bytes(out) or b"\0"


def outcome(data: bytes) -> str:
    """How one file ended; whatever it was, it is well formed and took a bounded time."""
    started = time.monotonic()
    result = prepare(SourceRow(0, "k", data), CONFIG)
    assert time.monotonic() - started < WORST_S
    if isinstance(result, Reject):
        assert result.reason in Reason
        assert 0 < len(result.message) < 600
        return result.reason.value
    assert result[0].pixels.shape == (32, 32, 3)
    return "ok"


def fuzz(originals: list[bytes], count: int, seed: int) -> Counter[tuple[str, str]]:
    """Outcomes of `count` mutated files by the format of the untouched one; this process neither ends nor grows."""
    outcomes: Counter[tuple[str, str]] = Counter()
    for original in originals:
        outcome(original)
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        original = data = originals[int(rng.integers(len(originals)))]
        for _ in range(int(rng.integers(1, 4))):
            data = mutate(data, rng)
        outcomes[sniff(original) or "other", outcome(data)] += 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size) >> 10 < GROWTH_MB
    assert preparing.children.idle.qsize() <= 1, "one thread, one child"
    assert outcomes.total() == count
    return outcomes


def test_every_seed_is_read_before_it_is_broken():
    assert [(sniff(data), outcome(data)) for data in seeds() if outcome(data) != "ok"] == []


def test_mutated_files_are_pixels_or_reasons():
    outcomes = fuzz(seeds(), 300, seed=11)
    assert sum(number for (_, how), number in outcomes.items() if how != "ok") > 50, "the mutations did not bite"


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_soak(shared_data: Path):
    real = sorted(p for folder in ("tricky", "photos") for p in (shared_data / folder).iterdir())
    originals = seeds() + [data for p in real if sniff(data := p.read_bytes()) and len(data) < 200_000]
    outcomes = fuzz(originals, int(os.environ.get("LATENTLOOM_FUZZ_COUNT", "20000")), seed=12)
    for (kind, how), number in sorted(outcomes.items()):
        print(f"{kind:9} {how:20} {number}")
