"""All benchmarks, one after the other: `python -m tests.benchmarks [AREA ...] [--out DIR] [--data FOLDER] [--quick]`.

Each area is a script that also runs alone. Tables go to standard output, figures with the machine's name as JSON and
a picture of them to DIR. Run it on a machine that does nothing else; peers that are not installed are left out and
named. What they need:

    pip install --constraint constraints.txt --editable '.[benchmarks]'
    pip install --no-deps mosaicml-streaming==0.13.0

The second by itself, as its bounds on numpy and transformers are below this project's. S3 is Ceph's gateway (Debian's
radosgw; without it that part is left out).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.photographs import data_folder


def photos(data: Path | None) -> list[str]:
    """Of the folder of real images, if there is one."""
    return ["--photos", f"{data / 'photos'}"] if data else []


AREAS: dict[str, Callable[[Path, Path | None, bool], list[str]]] = {
    "decode": lambda out, data, quick: ["--out", f"{out}", *(["--data", f"{data}"] if data else [])],
    "encode": lambda out, data, quick: [
        *("--out", f"{out}", "--images", "400" if quick else "2000", *photos(data)),
    ],
    "device_feed": lambda out, data, quick: [
        *("--out", f"{out}", *(["--sides", "256", "--sources", "0.3", "--seconds", "3"] if quick else [])),
        *(["--data", f"{data}"] if data else []),
    ],
    "encode_growth": lambda out, data, quick: [
        *("--out", f"{out}", *(["--images", "1000", "2000"] if quick else []), *photos(data)),
    ],
    "ledger_scale": lambda out, data, quick: [
        *("--out", f"{out}", "--images", "1e6", "1e7", *([] if quick else ["1e8", "1e9"])),
    ],
    "stream_read": lambda out, data, quick: [
        "--out",
        f"{out}",
        *(
            ["--mb", "32", "--epochs", "1", "--rounds", "1"]
            if quick
            else ["--groups", "1000000", "--sorted-mb", "10009"]
        ),
    ],
    "stream_places": lambda out, data, quick: ["--out", f"{out}", *(["--mb", "512"] if quick else [])],
    "train_step": lambda out, data, quick: ["--out", f"{out}", *([] if quick else ["--compile", "--kill"])],
    "learning": lambda out, data, quick: [
        *("--out", f"{out}", *(["--quick"] if quick else [])),
        *(["--data", f"{data / 'cifar10'}"] if data else []),
    ],
    "workers": lambda out, data, quick: [
        *(
            "--out",
            f"{out}",
            *(["--mb", "128", "--rows", "100000", "--captions", "512", "--rounds", "1"] if quick else []),
        ),
    ],
    "tracking_outage": lambda out, data, quick: ["--out", f"{out}"],
    "gpu": lambda out, data, quick: ["--out", f"{out}", *(["--quick"] if quick else [])],
    "sample_throughput": lambda out, data, quick: ["--out", f"{out}", *(["--many", "0"] if quick else [])],
}


def main() -> None:
    """Run the areas asked for; one that fails does not keep the others from running, and is named at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", help=f"of {', '.join(AREAS)}; all without")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument(
        "--data",
        type=Path,
        default=data_folder(),
        help="a folder with photos/, tricky/, cifar10/; without it that of the tests, else photographs are made up",
    )
    parser.add_argument("--quick", action="store_true", help="smaller inputs: to see that everything runs")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.areas) - set(AREAS))
    if unknown:
        parser.error(f"no such area: {', '.join(unknown)}; choose from {', '.join(AREAS)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for area in chosen.areas or AREAS:
        print(f"\n== {area}", flush=True)
        command = [f"tests.benchmarks.{area}", *AREAS[area](chosen.out, chosen.data, chosen.quick)]
        began = time.monotonic()
        if code := subprocess.run([sys.executable, "-m", *command]).returncode:
            failed.append(f"{area} (exit code {code})")
        print(f"{area}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"These failed: {', '.join(failed)}. Each can be run alone: python -m tests.benchmarks AREA")


if __name__ == "__main__":
    main()
