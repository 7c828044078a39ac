"""Mutated real files: every one ends as pixels or as a reason, and nothing raises."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from source_images import encode, gradient

from pipeline.source.config import ImageConfig
from pipeline.source.pixels.decode import sniff
from pipeline.source.pixels.prepare import Reject, prepare
from pipeline.source.reading.rows import SourceRow
from pipeline.source.reasons import Reason

pytestmark = pytest.mark.integration

CONFIG = ImageConfig(resolution=32, max_upscale=1e6, max_pixels=20_000_000, decode_cpu_s=5.0, phash=True)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One of the usual accidents: flipped bytes (often in the header), a cut, a hole, a doubled or foreign piece."""
    out = bytearray(data)
    kind = rng.integers(6)
    if kind <= 1:
        reach = len(out) if kind else min(len(out), 200)
        for _ in range(int(rng.integers(1, 12))):
            out[int(rng.integers(reach))] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    elif kind == 2:
        del out[int(rng.integers(len(out))) :]
    elif kind == 3:
        start = int(rng.integers(len(out)))
        del out[start : start + int(rng.integers(1, 64))]
    elif kind == 4:
        start = int(rng.integers(len(out)))
        out[start:start] = out[max(0, start - int(rng.integers(1, 4096))) : start]
    else:
        start = int(rng.integers(len(out)))
        out[start : start + 8] = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
    return bytes(out)


def check(data: bytes) -> str:
    """The outcome of one file; whatever it is, it is well formed."""
    result = prepare(SourceRow(0, "k", data), CONFIG)
    if isinstance(result, Reject):
        assert result.reason in Reason
        assert result.message
        assert len(result.message) < 600
        assert result.reason is not Reason.DECODER_CRASHED
        return result.reason.value
    assert result[0].pixels.shape == (32, 32, 3)
    assert result[0].pixels.dtype == np.uint8
    return "ok"


def fuzz(seeds: list[bytes], count: int, seed: int) -> Counter[tuple[str, str]]:
    """Outcomes of `count` mutations by the format of the untouched file."""
    outcomes: Counter[tuple[str, str]] = Counter()
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        original = seeds[int(rng.integers(len(seeds)))]
        data = original
        for _ in range(int(rng.integers(1, 4))):
            data = mutate(data, rng) or b"\0"
        outcomes[sniff(original) or "other", check(data)] += 1
    return outcomes


def made_seeds() -> list[bytes]:
    """Files of every format, small, so that a mutation often hits something that matters."""
    picture = gradient(48, 64)
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})]
    kinds += [("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("AVIF", {})]
    kinds += [("TIFF", {"compression": "jpeg"}), ("JPEG2000", {}), ("PPM", {})]
    return [encode(picture, kind, **options) for kind, options in kinds]


def test_mutated_files_of_every_format_never_raise():
    outcomes = fuzz(made_seeds(), 400, seed=1)
    assert outcomes.total() == 400
    assert {f for f, _ in outcomes} >= {"jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "jpeg2000", "ppm"}
    assert sum(n for (_, outcome), n in outcomes.items() if outcome != "ok") > 50, "the mutations did not bite"


@pytest.mark.slow
def test_many_mutated_real_files_never_raise(shared_data: Path):
    """Size and seed by LATENTLOOM_FUZZ_COUNT and LATENTLOOM_FUZZ_SEED; prints the table of outcomes."""
    paths = sorted((shared_data / "tricky").iterdir()) + sorted((shared_data / "photos").glob("*.jpg"))[:20]
    seeds = made_seeds() + [data for p in paths if sniff(data := p.read_bytes()) and len(data) < 300_000]
    count = int(os.environ.get("LATENTLOOM_FUZZ_COUNT", "3000"))
    outcomes = fuzz(seeds, count, seed=int(os.environ.get("LATENTLOOM_FUZZ_SEED", "7")))
    for (name, outcome), number in sorted(outcomes.items()):
        print(f"{name:9} {outcome:20} {number}")
    assert outcomes.total() == count


def test_random_bytes_and_bare_signatures_are_rejects():
    rng = np.random.default_rng(5)
    signatures = [s[:12] for s in made_seeds()] + [b"II+\0", b"MM\0*", b"P7\n", b"\xff\x4f\xff\x51", b"BM"]
    for signature in signatures:
        for length in (0, 1, 7, 100, 3000):
            assert check(signature + rng.integers(0, 256, length, dtype=np.uint8).tobytes()) != "ok"


def test_every_real_file_ends_as_pixels_or_as_a_reason(shared_data: Path):
    outcomes: Counter[tuple[str, str]] = Counter()
    paths = sorted(p for folder in ("tricky", "photos") for p in (shared_data / folder).iterdir())
    for path in paths:
        data = path.read_bytes()
        outcomes[sniff(data) or "other", check(data)] += 1
    assert outcomes.total() == len(paths)
    assert outcomes["jpeg", "ok"] >= 220
    assert not [o for o in outcomes if o[0] == "other" and o[1] != "unsupported_format"]
