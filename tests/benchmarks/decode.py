"""How fast images are decoded and resized, and what `Image.draft` costs in quality, by the size of the source.

    python -m tests.benchmarks.decode [--data FOLDER] [--resolution 512] [--rounds 5] [--out DIR]

Sources are mosaics of real photographs at their own scale (texture and sharp edges at full resolution: hard for a
decoder that shrinks) and one photograph enlarged to the same sizes. Three ways from JPEG bytes to uint8 pixels, one
process, one thread, alternating round by round: the product with draft, the product without, and plain Pillow (full
decode, the same crop, Lanczos). PSNR is that against plain Pillow. A second table shows what other draft margins than
the policy's would give, a third counts outcomes by format for every
file of `photos` and `tricky`. Without --data the photographs are made up, and the table says so.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from pipeline.source.config import ImageConfig
from pipeline.source.pixels import render
from pipeline.source.pixels.decode import sniff
from pipeline.source.pixels.prepare import Reject, prepare
from pipeline.source.pixels.render import place
from pipeline.source.reading.rows import SourceRow
from tests.benchmarks import report
from tests.benchmarks.photographs import MADE_UP, REAL, made_up

MARGINS = (1.0, 1.4, 2.0, 2.9, 1e9)  # the last one never drafts
LIBRARIES = ("jpg", "libjpeg_turbo", "webp", "avif")  # Pillow's own, on which the figures depend
SIZES = {"0.2 MP": (384, 512), "0.8 MP": (768, 1024), "3 MP": (1536, 2048), "12 MP": (3000, 4000)}
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def photographs(folder: Path | None, count: int = 24) -> list[Image.Image]:
    """Photographs of a folder, or made-up ones."""
    if folder is None:
        return made_up(count)
    return [Image.open(p).convert("RGB") for p in sorted((folder / "photos").glob("*.jpg"))[:count]]


def mosaic(photos: list[Image.Image], height: int, width: int) -> Image.Image:
    """Photographs side by side at their own scale, as many as it takes."""
    out, top, index = Image.new("RGB", (width, height)), 0, 0
    while top < height:
        left, row = 0, 0
        while left < width:
            photo = photos[index % len(photos)]
            out.paste(photo, (left, top))
            left, row, index = left + photo.width, max(row, photo.height), index + 1
        top += row
    return out


def as_jpeg(image: Image.Image) -> bytes:
    """The image as a camera would store it."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=92)
    return sink.getvalue()


def plain(data: bytes, resolution: int) -> Pixels:
    """Full decode, the same crop, one Lanczos resize: the reference, and what a simple loader does."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    at = place(image.height, image.width, [(resolution, resolution)], None)
    box = (at.left, at.top, at.left + at.width, at.top + at.height)
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))


def product(data: bytes, resolution: int, *, draft: bool) -> Pixels:
    """What the pipeline does, hashing of the bytes included."""
    config = ImageConfig(resolution=resolution, multiple_of=1, max_upscale=1e6, draft=draft)
    result = prepare(SourceRow(0, "k", data), config)
    assert isinstance(result, list), result
    return result[0].pixels


def psnr_db(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-10)))


def told_db(figure: float) -> str:
    """PSNR for a table; beyond 8-bit rounding the pictures are equal."""
    return f"{figure:8.1f}" if figure < 100 else "   exact"


def seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds of one call: other processes on the machine take no part in it."""
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) / repeats


def measure(photos: list[Image.Image], resolution: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """One line per source size: images per CPU second of each way, and PSNR of the product's two."""
    lines = []
    for name, (height, width) in SIZES.items():
        sources = {
            "mosaic": as_jpeg(mosaic(photos, height, width)),
            "enlarged": as_jpeg(photos[0].resize((width, height), Image.Resampling.LANCZOS)),
        }
        data = sources["mosaic"]
        ways: dict[str, Callable[[], Pixels]] = {
            "draft": lambda data=data: product(data, resolution, draft=True),  # type: ignore[misc]
            "full": lambda data=data: product(data, resolution, draft=False),  # type: ignore[misc]
            "plain": lambda data=data: plain(data, resolution),  # type: ignore[misc]
        }
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                taken[way].append(seconds(call, repeats))
        line: dict[str, Any] = {"source": name, "height": height, "width": width, "bytes": len(data)}
        for way, times in taken.items():
            line[f"{way}_images_per_s"] = 1 / statistics.median(times)
        line["draft_over_plain"] = statistics.median(
            p / d for p, d in zip(taken["plain"], taken["draft"], strict=True)
        )
        for kind, body in sources.items():
            reference = plain(body, resolution)
            for way in (True, False):
                figure = psnr_db(product(body, resolution, draft=way), reference)
                line[f"{kind}_{'draft' if way else 'full'}_psnr_db"] = figure
        lines.append(line)
    return lines


def front(photos: list[Image.Image], resolution: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Speed against quality of the largest source, by how many decoded pixels draft leaves per output pixel."""
    height, width = list(SIZES.values())[-1]
    data = as_jpeg(mosaic(photos, height, width))
    reference, chosen, lines = plain(data, resolution), render.DRAFT_MARGIN, []
    try:
        for margin in MARGINS:
            render.DRAFT_MARGIN = margin
            pixels = product(data, resolution, draft=True)
            times = [seconds(lambda: product(data, resolution, draft=True), repeats) for _ in range(rounds)]
            lines.append(
                {
                    "margin": margin,
                    "chosen": margin == chosen,
                    "images_per_s": 1 / statistics.median(times),
                    "psnr_db": psnr_db(pixels, reference),
                }
            )
    finally:
        render.DRAFT_MARGIN = chosen
    return lines


def outcomes(folder: Path) -> Counter[tuple[str, str]]:
    """(format by magic bytes, "ok" or reason) of every file of photos and tricky."""
    config = ImageConfig(resolution=64, max_upscale=1e6)
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(p for part in ("photos", "tricky") for p in (folder / part).iterdir() if p.is_file()):
        data = path.read_bytes()
        result = prepare(SourceRow(0, path.name, data), config)
        found[sniff(data) or "no image", result.reason.value if isinstance(result, Reject) else "ok"] += 1
    return found


def draw_front(folder: Path, margins: list[dict[str, Any]]) -> None:
    """Quality against speed, one point a draft margin, as decode.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for line in margins:
        quality = min(line["psnr_db"], 60.0)  # never drafting is exact: no finite figure
        axes.plot(line["images_per_s"], quality, "o", color="#1a73e8" if line["chosen"] else "#f9ab00")
        name = "no draft (exact)" if line["margin"] >= MARGINS[-1] else f"margin {line['margin']:g}"
        axes.annotate(name, (line["images_per_s"], quality), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_xlabel("images per CPU second")
    axes.set_ylabel("PSNR against plain Pillow, dB")
    axes.set_title("decode, 12 MP JPEG: draft margins, the policy's in blue", loc="left", fontsize=10)
    axes.margins(0.2)
    figure.tight_layout()
    figure.savefig(folder / "decode.png", dpi=120)
    pyplot.close(figure)


def show(lines: list[dict[str, Any]], margins: list[dict[str, Any]], found: Counter[tuple[str, str]]) -> None:
    """The tables, for a terminal."""
    print("source     images per CPU second         draft/plain   PSNR dB against plain: mosaic      enlarged")
    print("           draft     full    plain                                 draft    full    draft    full")
    for line in lines:
        rates = " ".join(f"{line[f'{way}_images_per_s']:8.1f}" for way in ("draft", "full", "plain"))
        quality = " ".join(
            told_db(line[f"{kind}_{way}_psnr_db"]) for kind in ("mosaic", "enlarged") for way in ("draft", "full")
        )
        print(f"{line['source']:8} {rates} {line['draft_over_plain']:12.2f} {'':14} {quality}")
    print("\ndraft leaves at least this many decoded pixels per output pixel and direction, largest source, mosaic")
    for line in margins:
        mark = "  <- the policy" if line["chosen"] else ""
        print(f"{line['margin']:8g} {line['images_per_s']:8.1f} images/CPU s {told_db(line['psnr_db'])} dB{mark}")
    if found:
        print("\nformat     outcome                files")
    for (name, outcome), number in sorted(found.items()):
        print(f"{name:10} {outcome:20} {number:7d}")
    if found:
        print(f"{'all':31} {found.total():7d}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="a folder with photos/ and tricky/")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4, help="images per round and way")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    lines = measure(photographs(options.data), options.resolution, options.rounds, options.repeats)
    margins = front(photographs(options.data), options.resolution, options.rounds, options.repeats)
    found = outcomes(options.data) if options.data else Counter()
    result = {
        "area": "decode",
        "resolution": options.resolution,
        "photographs": REAL if options.data else MADE_UP,
        "image_libraries": {name: features.version(name) for name in LIBRARIES},
        "sizes": lines,
        "front": margins,
        "outcomes": [{"format": f, "outcome": o, "files": n} for (f, o), n in sorted(found.items())],
    }
    show(lines, margins, found)
    if options.out:
        report.write(options.out, "decode", result)
        draw_front(options.out, margins)
    return result


if __name__ == "__main__":
    main()
