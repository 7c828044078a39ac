"""`python -m jobs.quickstart`: the whole journey on this machine, in minutes, as its user would type it.

Writes pictures of coloured shapes, fits a small VAE, encodes, trains, samples and evaluates, each by the ordinary
command with a configuration from configs/quickstart/. Everything lands in ./quickstart/. What an earlier run
finished is recognised and skipped; what it left half done is resumed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pipeline.config import SHIPPED
from pipeline.errors import ConflictError
from pipeline.progress import Progress
from pipeline.storage.root import Root
from pipeline.storage.stored import OBJECT, read_stored

CONFIGS = Path("configs/quickstart")
if not CONFIGS.is_dir():  # outside a checkout: those that come with the package
    CONFIGS = SHIPPED / "quickstart"
PLACE = "quickstart"
NUM_IMAGES = 4096
LEAST_ACCURACY = 0.90
STAGES = {
    "fit_codec": "Fit a small VAE on the pictures",
    "encode": "Encode the pictures to latents (Ray Data)",
    "train": "Train a class-conditional flow model on the latents (Ray Train, 2 workers)",
    "sample": "Draw pictures of every class (Ray Data)",
    "evaluate": "Judge them with a classifier fitted on real pictures only",
}
# Several processes share the cores: threads that spin while they wait steal them from each other.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Done:
    """One finished stage: its answer (the last line on its standard output) and how long it took."""

    answer: dict[str, Any]
    seconds: float


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run every stage in turn; exits with the code of the first that fails."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments:
        print(__doc__)
        sys.exit(0 if arguments in (["--help"], ["-h"]) else 2)
    print(f"[1/{1 + len(STAGES)}] Write {NUM_IMAGES:,} pictures of shapes to {PLACE}/images", flush=True)
    began = time.monotonic()
    with Progress("write", NUM_IMAGES) as progress:
        report = write_shapes(f"{PLACE}/images", count=NUM_IMAGES, progress=progress.update)
        progress.update(report.images)
    seconds = {"data": time.monotonic() - began}
    print(f"      {'there already' if report.skipped else 'done'} in {seconds['data']:.0f} s", flush=True)
    done: dict[str, Done] = {}
    for number, (job, what) in enumerate(STAGES.items(), 2):
        print(f"\n[{number}/{1 + len(STAGES)}] {what}", flush=True)
        done[job] = _run(job)
        seconds[job] = done[job].seconds
    sys.exit(_finish(done, seconds))


def _run(job: str) -> Done:
    """One job as a process of its own; its progress goes to this terminal."""
    arguments = ["-m", f"jobs.{job}", str(CONFIGS / f"{job}.yaml")]
    command = shlex.join(["python", *arguments])
    print(f"      $ {command}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, **os.environ}
    )
    try:
        out, _ = process.communicate()
    except KeyboardInterrupt:
        process.wait()  # the terminal has interrupted it too: let it put its work away
        print("\nquickstart: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(75)
    seconds = time.monotonic() - began
    # The answer is the JSON object on the last line.
    try:
        answer = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        answer = None
    if process.returncode != 0 or not isinstance(answer, dict):
        code = process.returncode or 1
        print(
            f"\nquickstart: {job} stopped with exit code {code} (its message is above).\n"
            f"To run this stage alone:      {command}\n"
            f"To go on with all of it:      python -m jobs.quickstart",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(code if code > 0 else 1)
    print(f"      {answer.get('status', 'done')} in {seconds:.0f} s", flush=True)
    return Done(answer, seconds)


def _finish(done: dict[str, Done], seconds: dict[str, float]) -> int:
    """Where everything is, and one line of figures; the exit code."""
    from pipeline.config import load_config
    from pipeline.evaluate.config import EvaluateJobConfig
    from pipeline.tracking.delivery import mlflow_ui_command

    tracking = load_config(EvaluateJobConfig, [str(CONFIGS / "evaluate.yaml")]).tracking
    samples, report = (done[job].answer.get("outputs", {}) for job in ("sample", "evaluate"))
    print("\nstage         seconds  status")
    for stage, stage_s in seconds.items():
        print(f"{stage:12}  {stage_s:7.1f}  {done[stage].answer.get('status', '') if stage in done else 'done'}")
    print(f"\nContact sheet  {samples.get('contact', f'{PLACE}/samples')}")
    print(f"Report         {report['report']}")
    print(f"MLflow         {mlflow_ui_command(tracking.uri)}")
    figures = done["evaluate"].answer.get("figures", {})
    accuracy, psnr_db = figures.get("accuracy"), figures.get("psnr_db")
    by_stage = " ".join(f"{stage}={stage_s:.0f}s" for stage, stage_s in seconds.items())
    print(
        f"\nfigures: accuracy={_shown(accuracy)} psnr_db={_shown(psnr_db)} "
        f"total={sum(seconds.values()):.0f}s {by_stage}",
        flush=True,
    )
    if accuracy is None or accuracy < LEAST_ACCURACY:
        print(
            f"quickstart: {_shown(accuracy)} of the samples show the class asked for; {LEAST_ACCURACY} was expected",
            file=sys.stderr,
        )
        return 1
    return 0


def _shown(value: float | None) -> str:
    return "absent" if value is None else f"{value:.4g}"


# -- The data: small pictures of coloured shapes, written as an image folder with metadata.jsonl -----------------
#
# Twelve classes (circle, square, triangle, cross in red, green, blue), each picture drawn from (seed, index) alone:
# place, size, shade and background are random, the label is index modulo 12. The same call always writes the same
# bytes, so an interrupted one is simply repeated; a finished one is recognised by its marker and skipped.

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "green", "blue")
CLASS_NAMES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
_RGB = {"red": (215, 45, 40), "green": (45, 180, 60), "blue": (45, 85, 215)}
_VERSION = 1
_SUPERSAMPLING = 4
_MARKER = ".shapes.json"  # hidden, so that it is no row of the folder
_METADATA = "metadata.jsonl"
_UPLOADS = 16


@dataclass(frozen=True)
class ShapesReport:
    """What one call did."""

    images: int
    written: int
    skipped: bool


def write_shapes(
    uri: str,
    *,
    count: int = 4096,
    seed: int = 0,
    size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> ShapesReport:
    """Write `count` pictures of `size` x `size` pixels and their metadata below `uri`, unless they are there.

    ConflictError when the place holds shapes of other parameters; `progress` gets the number of pictures done.
    """
    root = Root(uri)
    marker = {"version": _VERSION, "count": count, "seed": seed, "size": size}
    try:
        present = read_stored(OBJECT, root, _MARKER)
    except FileNotFoundError:
        present = None
    if present is not None and present != marker:
        raise ConflictError(
            f"{root.uri} holds shapes made with {present}",
            key="uri",
            value=uri,
            rule=f"asked for {marker}",
            next_step="choose another place, or the same parameters",
        )
    if present is not None:
        return ShapesReport(count, 0, skipped=True)
    lines = [
        json.dumps(
            {"file_name": _name(i), "label": i % len(CLASS_NAMES), "text": f"a {CLASS_NAMES[i % len(CLASS_NAMES)]}"}
        )
        for i in range(count)
    ]

    from PIL import Image

    def write(index: int) -> int:
        sink = io.BytesIO()
        Image.fromarray(draw_shape(seed, index, size)).save(sink, "PNG")
        _put(root, _name(index), sink.getvalue())
        return index

    with ThreadPoolExecutor(_UPLOADS) as pool:
        # Only uploads wait for anything that others could use meanwhile.
        for index in (pool.map if root.local_path() is None else map)(write, range(count)):
            if progress is not None:
                progress(index + 1)
    _put(root, _METADATA, ("\n".join(lines) + "\n").encode())
    root.put(_MARKER, json.dumps(marker).encode())
    return ShapesReport(count, count, skipped=False)


def draw_shape(seed: int, index: int, size: int) -> np.ndarray:
    """Picture `index` of a seed, uint8 [size, size, 3]; its label is index modulo 12."""
    from PIL import Image, ImageDraw

    label = index % len(CLASS_NAMES)
    color, shape = COLORS[label % len(COLORS)], SHAPES[label // len(COLORS)]
    key = hashlib.blake2b(f"shapes {seed} {index}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
    grey = rng.uniform(25, 230)
    background = tuple(int(c) for c in np.clip(grey + rng.uniform(-14, 14, 3), 0, 255))
    shade = tuple(int(c) for c in np.clip(np.array(_RGB[color]) + rng.uniform(-25, 25, 3), 0, 255))
    side = size * _SUPERSAMPLING
    radius = rng.uniform(0.26, 0.42) * side
    x, y = rng.uniform(radius, side - radius, 2)
    canvas = Image.new("RGB", (side, side), background)
    pen, r = ImageDraw.Draw(canvas), radius
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=shade)
    elif shape == "square":
        half = 0.82 * r
        pen.rectangle((x - half, y - half, x + half, y + half), fill=shade)
    elif shape == "triangle":
        corners = [(x + r * math.sin(a), y - r * math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
        pen.polygon(corners, fill=shade)
    else:
        arm = 0.30 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=shade)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=shade)
    return np.array(canvas.resize((size, size), Image.Resampling.BOX))


def _put(root: Root, key: str, data: bytes) -> None:
    path = root.local_path(key)
    if path is None:
        root.put(key, data)
        return
    # Plain writes: the marker, written durably at the end, is what says that these are whole.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _name(index: int) -> str:
    return f"images/{index // 1000:03d}/{index:06d}.png"


if __name__ == "__main__":
    main()
