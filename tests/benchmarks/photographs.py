"""The photographs that benchmarks work on: those of a folder, or made-up ones where there is none."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image

REAL, MADE_UP = "real", "made up"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def data_folder() -> Path | None:
    """The tests' real images, a folder with `photos` and `tricky`; None where they are not at hand."""
    path = Path(os.environ.get("LATENTLOOM_TEST_DATA", "../shared/data"))
    return path if (path / "photos").is_dir() else None


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--photos`."""
    parser.add_argument(
        "--photos", type=Path, help="a folder of photographs; without it those of the tests, else made-up ones"
    )


def folder_of(given: Path | None, parser: argparse.ArgumentParser, place: Path) -> tuple[Path, str]:
    """(folder of photographs, whether they are real); made-up ones are written below `place`."""
    data = data_folder()
    folder = given or (data / "photos" if data else None)
    if folder is not None:
        if not folder.is_dir() or not image_files(folder):
            parser.error(f"--photos {folder}: no folder with {', '.join(_SUFFIXES)} files in it")
        return folder, REAL
    folder = place / "photographs"
    folder.mkdir(parents=True)
    for number, picture in enumerate(made_up(24)):
        picture.save(folder / f"{number:03d}.jpg", quality=92)
    return folder, MADE_UP


def image_files(folder: Path) -> list[Path]:
    """What a benchmark takes from a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)


def made_up(count: int) -> list[Image.Image]:
    """Noise of many scales, 512 x 384."""
    chance = np.random.default_rng(0)
    made = []
    for _ in range(count):
        picture = np.zeros((384, 512, 3))
        for scale in (1, 4, 16, 64):
            coarse = chance.integers(0, 256, (384 // scale, 512 // scale, 3), np.uint8)
            wide = Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC)
            picture += np.asarray(wide, np.float64) * scale / 85
        made.append(Image.fromarray(picture.clip(0, 255).astype(np.uint8)))
    return made
