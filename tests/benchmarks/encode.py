"""Encoding a folder of images: the product, two peers, and the limit, on the same files and codec in one run.

    python -m tests.benchmarks.encode [--photos FOLDER] [--images 2000] [--codec small sd] [--rounds 1] [--out DIR]
        [--set image.buckets.kind=aspect ...] [--before COMMIT]

Each contender is a command of its own and runs on a quarter of the images and on all of them. Its rate is that of
the images between: what starting up costs falls out of the difference, and is shown beside it. The photographs are
repeated under new names. `small` is an AutoencoderKL in which the pipeline dominates, `sd` one of the size and shape
of Stable Diffusion's, both with random weights; `sd` gets a sixteenth of the images,
of half the resolution, in batches of a quarter.

A figure is the median of the rounds, in which the contenders take turns; a share of the limit is the median of the
shares in each round, for a shared machine is not equally fast all the time.

Two figures say how near to the limit: of the same work as torch does it when nobody tells it more, and of the best
there is, which keeps freed memory as the product's encoders do (`CPU_WORKER_ENV`).

`--set` changes settings of the product's job (peers and limit have none of them). `--before` also runs the job as it
was at an earlier commit, in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import photographs, report

LIMIT, KEPT = "no pipeline", "freed memory kept"
Figures = dict[str, float]
_TOLD_APART = 0.1  # of the whole command: what one with a quarter of the images must take less
CODECS = {"small": (16, 32, 32, 32), "sd": (128, 256, 512, 512)}


@dataclass(frozen=True)
class Case:
    """One input: files, a codec, and how they are encoded."""

    images: Path
    count: int
    codec: Path
    resolution: int
    batch: int
    actors: int
    changes: tuple[str, ...] = ()
    unit_rows: int = 256


def make_codec(folder: Path, kind: str) -> Path:
    """An AutoencoderKL of factor 8 and four channels with random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    channels = CODECS[kind]
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2 if kind == "sd" else 1,
        latent_channels=4,
        norm_num_groups=min(32, channels[0]),
        mid_block_add_attention=kind == "sd",
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def make_images(folder: Path, photos: Path, count: int) -> Path:
    """`count` files, each photograph under many names."""
    sources = photographs.image_files(photos)
    folder.mkdir(parents=True)
    for number in range(count):
        source = sources[number % len(sources)]
        place = folder / f"{number:07d}{source.suffix.lower()}"
        if number < len(sources):
            shutil.copyfile(source, place)
        else:
            os.link(folder / f"{number % len(sources):07d}{source.suffix.lower()}", place)
    return folder


def ours(case: Case, out: Path) -> list[str]:
    """The job, by its ordinary command."""
    settings = {
        "source.kind": "folder",
        "source.uri": case.images,
        "image.resolution": case.resolution,
        "image.multiple_of": 8,
        "image.max_upscale": 8.0,
        "codec.path": case.codec,
        "output.uri": out,
        "encode.batch_size": case.batch,
        "encode.actors": case.actors,
        "encode.unit_rows": case.unit_rows,
        "tracking.enabled": "false",
        "cluster.dashboard": "false",
    }
    return ["jobs.encode", *(f"{key}={value}" for key, value in settings.items()), *case.changes]


Contender = Callable[[Case, Path], list[str]]


def peer(name: str, more: Callable[[Case], tuple[int, ...]] = lambda case: ()) -> Contender:
    """A script of tests/benchmarks/peers; `more` are arguments that it alone has."""

    def command(case: Case, out: Path) -> list[str]:
        place = f"tests.benchmarks.peers.{name}"
        return [place, *map(str, (case.images, case.codec, out, case.resolution, case.batch, *more(case)))]

    return command


def limit(processes: int, *flags: str) -> Contender:
    """Decoding and the VAE alone."""

    def command(case: Case, out: Path) -> list[str]:
        place = "tests.benchmarks.peers.encode_limit"
        return [place, *map(str, (case.images, case.codec, case.resolution, case.batch, processes, *flags))]

    return command


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The tree of a commit of this repository."""
    with tempfile.TemporaryDirectory(prefix="before-") as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)


def environment(tree: Path | None = None) -> dict[str, str]:
    """For a contender's process; `tree`: the source it runs from, when it is not this one."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}
    env.pop("RAY_ADDRESS", None)
    return env if tree is None else {**env, "PYTHONPATH": str(tree)}


def run(command: list[str], tree: Path | None = None) -> float:
    """Seconds of the whole command."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment(tree),
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def stored(out: Path) -> tuple[int, int, float]:
    """(files, bytes, milliseconds to list them and open the first) of what a contender left."""
    began = time.perf_counter()
    files = [p for p in sorted(out.rglob("*")) if p.is_file()]
    if files:
        with files[0].open("rb") as first:
            first.read(1)
    return len(files), sum(p.stat().st_size for p in files), 1e3 * (time.perf_counter() - began)


def measure(
    case: Case, quarter: Case, contender: Contender, place: Path, tree: Path | None = None
) -> dict[str, float]:
    """One contender on the quarter and on the whole; rate and start are NaN where the two cannot be told apart."""
    few = run(contender(quarter, place / "quarter"), tree)
    many = run(contender(case, place / "whole"), tree)
    files, size, list_ms = stored(place / "whole") if (place / "whole").exists() else (0, 0, 0.0)
    shutil.rmtree(place, ignore_errors=True)
    # Starts vary by seconds: with few images that is all there is to see.
    rate = (case.count - quarter.count) / (many - few) if many - few > _TOLD_APART * many else math.nan
    return {
        "images_per_s": rate,
        "command_s": many,
        "start_s": many - case.count / rate,
        "files": files,
        "bytes_per_image": size / case.count,
        "list_ms": list_ms,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photographs.add_option(parser)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--codec", nargs="*", choices=sorted(CODECS), default=["small", "sd"])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--actors", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", help="contenders to run; all without")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the product's job")
    parser.add_argument("--before", metavar="COMMIT", help="an earlier commit, whose job runs, too")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    cores = os.cpu_count() or 1
    contenders = {
        "ours": ours,
        "DataLoader, a file an image": peer("encode_loop"),
        "Ray Data template": peer("encode_ray_data", lambda case: (case.actors,)),
        **{f"{LIMIT}, {n} process(es)": limit(n) for n in sorted({1, cores})},
        f"{LIMIT}, {cores} process(es), {KEPT}": limit(cores, "keep"),
    }
    if chosen.only:
        if unknown := sorted(set(chosen.only) - set(contenders)):
            parser.error(f"no such contender: {', '.join(unknown)}; choose from {', '.join(contenders)}")
        contenders = {name: contenders[name] for name in chosen.only}
    with contextlib.ExitStack() as stack:
        trees: dict[str, Path] = {}
        if chosen.before:
            name = f"ours at {chosen.before}"
            contenders[name], trees[name] = ours, stack.enter_context(checkout(chosen.before))
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        chosen.photos, chosen.kind = photographs.folder_of(chosen.photos, parser, place)
        print(f"photographs: {chosen.kind}")
        for codec in chosen.codec:
            compare(codec, contenders, trees, chosen)


def compare(codec: str, contenders: dict[str, Contender], trees: dict[str, Path], chosen: argparse.Namespace) -> None:
    """All contenders with one codec."""
    images, resolution, batch = chosen.images, chosen.resolution, chosen.batch
    if codec == "sd":
        images, resolution, batch = max(32, images // 16), resolution // 2, max(1, batch // 4)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        counts = (images, images // 4)
        # One unit is one actor's work: with few of them, actors wait at the end for the last one.
        rows = max(batch, counts[1] // (4 * chosen.actors))
        how = (make_codec(place / "codec", codec), resolution, batch, chosen.actors, tuple(chosen.set), rows)
        cases = [Case(make_images(place / str(n), chosen.photos, n), n, *how) for n in counts]
        rounds: list[dict[str, Figures]] = []
        for _ in range(chosen.rounds):
            rounds.append({})
            for name, contender in contenders.items():
                rounds[-1][name] = measure(*cases, contender, place / "out", trees.get(name))
                print(f"{name}: {rounds[-1][name]['images_per_s']:.2f} images/s", file=sys.stderr, flush=True)
    found = {
        name: {key: report.median(r[name][key] for r in rounds) for key in rounds[0][name]} for name in contenders
    }
    rows = [
        [n, f["images_per_s"], share(n, rounds, kept=False), share(n, rounds, kept=True)]
        + [f[key] for key in ("start_s", "files", "bytes_per_image", "list_ms")]
        for n, f in found.items()
    ]
    heads = [f"{codec}, {resolution} px", "images/s", "of limit", "of best limit"]
    heads += ["start s", "files", "bytes/image", "list+open ms"]
    print(report.table(heads, rows))
    if any(math.isnan(f["images_per_s"]) for f in found.values()):
        print(f"-: {counts[1]} and {images} images took too much alike to tell a rate; take more (--images)")
    name = f"encode_{codec}_{resolution}{'_set' if chosen.set else ''}"
    about = {"images": images, "photographs": chosen.kind, "set": chosen.set}
    report.write(chosen.out, name, {**about, "contenders": found, "rounds": rounds})
    title = f"encode, {codec} codec, {resolution} px"
    report.bars(chosen.out, name, title, {n: f["images_per_s"] for n, f in found.items()}, "images/s")


def share(name: str, rounds: list[dict[str, Figures]], *, kept: bool) -> float:
    """Of the limit in the same round; `kept`: of the better one of those with freed memory kept and without."""
    limits = [n for n in rounds[0] if n.startswith(LIMIT) and (kept or KEPT not in n)]
    known = [[r[n]["images_per_s"] for n in limits if not math.isnan(r[n]["images_per_s"])] for r in rounds]
    best = [max(rates, default=math.nan) for rates in known]
    return report.median(r[name]["images_per_s"] / most for r, most in zip(rounds, best, strict=True))


if __name__ == "__main__":
    main()
