"""The command: choose a device and a scale, measure area by area, print tables, write JSON as it goes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import gpu as package
from tests.benchmarks import report
from tests.benchmarks.gpu import encode, sample, train
from tests.benchmarks.gpu.device import Bench, datasheet_peak, facts, measured_peak
from tests.benchmarks.gpu.shapes import FULL, QUICK, REDUCED, Scale

Figures = Callable[[Bench, Scale], Iterator[dict[str, Any]]]

# area -> its parts: name in the JSON, heads of its table, what measures it.
AREAS: dict[str, tuple[tuple[str, Mapping[str, str], Figures], ...]] = {
    "encode": (("encode", encode.HEADS, encode.figures),),
    "train": (
        ("train_step", train.STEP_HEADS, train.figures),
        ("forward_backward", train.PASS_HEADS, train.pass_figures),
    ),
    "sample": (("sample", sample.HEADS, sample.figures),),
}
_PEERS = ("bare_images_per_s", "diffusers_images_per_s")
_NATIVE_BF16 = (8, 0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; `areas` becomes a list, `device` one that exists."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: a GPU if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks: to see that everything runs")
    parser.add_argument("--areas", default=",".join(AREAS), help=f"of {', '.join(AREAS)}; all without")
    parser.add_argument(
        "--compile", choices=["auto", "off", "on", "both"], default="auto", help="auto: both on CUDA, off on a CPU"
    )
    parser.add_argument("--out", type=Path, help="a folder for gpu.json, written anew after each figure, and gpu.png")
    chosen = parser.parse_args(arguments)
    chosen.areas = chosen.areas.split(",")
    unknown = sorted(set(chosen.areas) - set(AREAS))
    if unknown:
        parser.error(f"no such area: {', '.join(unknown)}; choose from {', '.join(AREAS)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; --device cpu takes figures of reduced networks")
    if chosen.device == "auto":
        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    return chosen


def prepare(device: str, quick: bool, form: str) -> tuple[Bench, Scale, dict[str, Any]]:
    """The device with its peak measured, what suits it, and the facts about it."""
    cuda = device == "cuda"
    scale = QUICK if quick else FULL if cuda else REDUCED
    forms = {"off": (False,), "on": (True,), "both": (False, True), "auto": (False, True) if cuda else (False,)}
    bench = Bench(
        torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        "bfloat16" if cuda else "float32",
        forms[form],
        warmup=1,
    )
    if quick:
        bench.say("quick: tiny networks, to see that everything runs; their figures mean nothing")
    if not cuda:
        bench.say(
            "no CUDA device is used: figures of full-size networks are not taken on a CPU; the networks below are "
            f"of {'tiny' if quick else 'reduced'} size and computed in float32"
        )
    elif torch.cuda.get_device_capability(bench.device) < _NATIVE_BF16:
        bench.say("this device has no native bfloat16: the figures are of emulated arithmetic, nothing is compiled")
        bench.compiled = (False,)
        scale = replace(scale, matmul=scale.matmul[:1])  # the largest ones would take minutes
    bench.peak, size = measured_peak(bench, scale.matmul, scale.rounds)
    bench.datasheet = datasheet_peak(bench.device)
    return bench, scale, facts(bench, size)


def shown(heads: Mapping[str, str], rows: list[dict[str, Any]]) -> str:
    """Rows as a table; what was not measured is a dash, and a column of dashes is left out."""
    kept = [key for key in heads if any(row[key] is not None for row in rows)]
    return report.table([heads[key] for key in kept], [["-" if r[k] is None else r[k] for k in kept] for r in rows])


def draw(out: Path | None, found: Mapping[str, Any], bench: Bench) -> None:
    """A picture of the rates where there is matplotlib, which nothing else here needs; else a note."""
    if out is None:
        return
    parts: dict[str, dict[str, float]] = {}
    for name, rows in found["areas"].items():
        for row in rows:
            what = f"{row.get('codec') or row['model']}{_side(row)}{', compiled' if row['compile'] else ''}"
            bars = parts.setdefault(f"{name}, images/s", {})
            bars[f"ours: {what}"] = row["images_per_s"]
            bars |= {f"{key.split('_')[0]}: {what}": row[key] for key in _PEERS if row.get(key) is not None}
    try:
        report.panels(out, "gpu", f"{found['device'].get('name', 'CPU')}, {found['scale']} networks", parts)
    except ImportError:
        bench.say("no picture: matplotlib is not installed")


def _side(row: Mapping[str, Any]) -> str:
    return f", {row['side']} px" if "side" in row else ""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    chosen = parse(arguments)
    bench, scale, about = prepare(chosen.device, chosen.quick, chosen.compile)
    found: dict[str, Any] = {"device": about, "scale": scale.name, "notes": bench.notes, "areas": {}}

    print(f"{about.get('name', 'CPU')}: {bench.peak / 1e12:.4g} TFLOP/s measured by a {about['measured_by']}")
    if bench.datasheet:
        print(f"{bench.datasheet / 1e12:.4g} TFLOP/s by {about['datasheet_source']}")
    for area in chosen.areas:
        for name, heads, figures in AREAS[area]:
            rows = found["areas"][name] = []
            for row in figures(bench, scale):
                rows.append(row)
                print(f"{name}: {row}", file=sys.stderr, flush=True)
                report.write(chosen.out, "gpu", found)
            if rows:
                print(f"\n{shown(heads, rows)}", flush=True)
    draw(chosen.out, found, bench)
    report.write(chosen.out, "gpu", found)
    for note in bench.notes:
        print(f"\nnote: {note}")


if __name__ == "__main__":
    main()
