"""How the cost of encoding grows: with the number of actors, and with the number of images, with memory.

    python -m tests.benchmarks.encode_growth [--actors 1 2 4] [--images 1000 10000 100000] [--out DIR]

With actors: 800 photographs of 256 px, small codec; a rate is that of the 600 images beyond the first 200, so that
what starting costs falls out. With images: the photographs, made small once (`--side`, 64 px) and repeated under new
names, so that a hundred thousand of them fit an evening; a run is a command of its own from planning to its last
commit, and its memory is the private memory (resident less shared) of the largest process in each role.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from tests.benchmarks import photographs, report
from tests.benchmarks.encode import Case, environment, make_codec, make_images, measure, ours
from tests.benchmarks.memory import MemoryWatch

# The process that is started watches over the one that works, whose command line is the same.
ROLES = {
    "EncodeBlocks": "encoder actor",
    "ReadImages": "read task",
    "CommitLatents": "write task",
    "jobs.encode": "driver",
}
BATCH = 16


def with_actors(place: Path, photos: Path, counts: list[int]) -> dict[str, float]:
    """Images a second by number of actors."""
    codec = make_codec(place / "codec", "small")
    many, few = make_images(place / "many", photos, 800), make_images(place / "few", photos, 200)
    rates = {}
    for actors in counts:
        how = (codec, 256, BATCH, actors, (), max(BATCH, 50 // actors))
        cases = Case(many, 800, *how), Case(few, 200, *how)
        rates[f"{actors}"] = measure(*cases, ours, place / "out")["images_per_s"]
        print(f"{actors} actors: {rates[f'{actors}']:.1f} images/s", file=sys.stderr, flush=True)
    return rates


def with_images(place: Path, photos: Path, counts: list[int], side: int) -> list[dict[str, Any]]:
    """Seconds, microseconds an image beyond the smallest run, and memory, by number of images."""
    place.mkdir()
    codec = make_codec(place / "codec", "small")
    small = make_small(place / "small", photos, side)
    found: list[dict[str, Any]] = []
    for count in counts:
        images = make_images(place / str(count), small, count)
        case = Case(images, count, codec, side, 4 * BATCH, os.cpu_count() or 1)
        seconds, watch = watched(ours(case, place / f"out-{count}"))
        one: dict[str, Any] = {"images": count, "seconds": seconds, "peak_mib": watch.peak_mib()}
        if found:
            first = found[0]
            one["us_per_image"] = 1e6 * (seconds - first["seconds"]) / (count - first["images"])
        if count == counts[-1]:
            one["growth_mib"] = watch.growth_mib()
        found.append(one)
        print(f"{count:,} images: {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def make_small(folder: Path, photos: Path, side: int) -> Path:
    """The photographs as JPEGs whose short side is `side`."""
    folder.mkdir()
    for path in photographs.image_files(photos):
        with Image.open(path) as image:
            scale = side / min(image.size)
            size = max(side, round(image.width * scale)), max(side, round(image.height * scale))
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(folder / f"{path.stem}.jpg", quality=92)
    return folder


def watched(command: list[str]) -> tuple[float, MemoryWatch]:
    """Seconds of a command, and its memory."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment(), stdout=subprocess.DEVNULL, stderr=errors
        )
        with MemoryWatch(ROLES, process.pid) as watch:
            code = process.wait()
        if code:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-3000:].decode(errors='replace')}")
    return time.perf_counter() - began, watch


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photographs.add_option(parser)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--side", type=int, default=64, help="of the images whose number grows")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        photos, figures["photographs"] = photographs.folder_of(chosen.photos, parser, place)
        print(f"photographs: {figures['photographs']}")
        if chosen.actors:
            figures["images_per_s_by_actors"] = rates = with_actors(place, photos, chosen.actors)
            first = next(iter(rates.values()))
            print(report.table(["actors", "images/s", "of the first"], [[n, r, r / first] for n, r in rates.items()]))
        if chosen.images:
            figures["by_images"] = runs = with_images(place / "growth", photos, chosen.images, chosen.side)
            print(f"\n{growth_table(runs)}")
    report.write(chosen.out, "encode_growth", figures)
    report.panels(chosen.out, "encode_growth", "encoding, by actors and by images", pictured(figures))


def pictured(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rates by actors; cost and memory by images."""
    runs = figures.get("by_images", [])
    return {
        "images/s by encoder actors": {f"{n}": rate for n, rate in figures.get("images_per_s_by_actors", {}).items()},
        "µs an image beyond the smallest run": {
            f"{run['images']:,} images": run["us_per_image"] for run in runs if "us_per_image" in run
        },
        "MiB of the largest process at its peak": {
            f"{run['images']:,} images: {role}": run["peak_mib"][role]
            for role in ("driver", "encoder actor")
            for run in runs
            if role in run["peak_mib"]
        },
    }


def growth_table(runs: list[dict[str, Any]]) -> str:
    """Time, and the peak of every role in MiB; the last line is the last run's growth, third quarter to last."""
    roles = sorted({role for run in runs for role in run["peak_mib"]})
    rows: list[list[object]] = [
        [
            f"{run['images']:,}",
            run["seconds"],
            run.get("us_per_image", "-"),
            *(run["peak_mib"].get(r, "-") for r in roles),
        ]
        for run in runs
    ]
    growth = runs[-1]["growth_mib"]
    rows.append(["growth", "", "", *("-" if growth.get(r) is None else growth[r] for r in roles)])
    return report.table(["images", "seconds", "us an image more", *(f"{r}, MiB" for r in roles)], rows)


if __name__ == "__main__":
    main()
