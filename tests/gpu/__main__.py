"""Run as many checks as fit into the minutes, one process each; a table, JSON, and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import gpu as package
from tests.benchmarks import report
from tests.gpu import encoder, jobs, training
from tests.gpu.ground import Ground, Lines

# Most valuable first.
CHECKS: dict[str, Callable[[Ground], Lines]] = {
    check.__name__: check
    for check in (
        jobs.encode_killed,
        encoder.against_cpu,
        encoder.short_of_memory,
        jobs.device_assert,
        encoder.encode_rates,
        encoder.encode_fed,
        training.training_steps,
        training.fsdp,
        training.equal_runs,
        jobs.chain,
        encoder.encode_rates_compiled,
    )
}
LEAST_S = 30.0  # what a check may need: with less left none is begun
LONGEST_S = 180.0  # of one check: it would be at fault, not slow


def one(name: str, *, rehearsal: bool) -> Lines:
    """Run one check in a fresh folder, in this process."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        return CHECKS[name](Ground(Path(folder), rehearsal))


def in_child(name: str, *, rehearsal: bool, seconds: float) -> dict[str, Any]:
    """Run one check in a process of its own: its outcome, seconds, figures, and its last words where it failed."""
    command = [sys.executable, "-m", "tests.gpu", "--one", name, *(["--rehearse"] if rehearsal else [])]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            out, _ = child.communicate(timeout=seconds)
            outcome = "passed" if child.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            out, outcome = "", "no end"
            child.wait()
        errors.seek(0)
        words = errors.read()[-4000:]
    lines = json.loads(out.strip().splitlines()[-1]) if outcome == "passed" else {}
    told = {"words": words} if outcome != "passed" else {}
    return {"outcome": outcome, "seconds": time.monotonic() - began, "lines": lines, **told}


def table(found: dict[str, dict[str, Any]]) -> str:
    """One line a case: check and case, outcome, seconds, and what it found."""
    rows = [f"{'check':<44} {'outcome':<8} {'s':>4}  figures", "-" * 90]
    for name, result in found.items():
        for case, figures in (result["lines"] or {"": {}}).items():
            shown = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in figures.items()
            ]
            head = f"{f'{name} {case}'.strip():<44} {result['outcome']:<8} {result['seconds']:>4.0f}"
            rows.append(f"{head}  {', '.join(shown)}")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """See the package."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)}; all without")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if unknown := sorted(set(chosen.only or ()) - set(CHECKS)):
        parser.error(f"no such check: {', '.join(unknown)}; choose from {', '.join(CHECKS)}")
    if not chosen.rehearse and not torch.cuda.is_available():
        print("tests.gpu: torch sees no CUDA device; --rehearse runs the checks on a CPU", file=sys.stderr)
        return 2
    if chosen.one:
        print(json.dumps(one(chosen.one, rehearsal=chosen.rehearse)))
        return 0
    ends = time.monotonic() + 60 * chosen.minutes
    found: dict[str, dict[str, Any]] = {}
    for name in chosen.only or CHECKS:
        left = ends - time.monotonic()
        if left < LEAST_S:
            found[name] = {"outcome": "no time", "seconds": 0.0, "lines": {}}
        else:
            found[name] = in_child(name, rehearsal=chosen.rehearse, seconds=min(left, LONGEST_S))
        print(f"{name}: {found[name]['outcome']}", file=sys.stderr, flush=True)
        print(found[name].get("words", ""), file=sys.stderr, end="", flush=True)
        report.write(chosen.out, "gpu_checks", {"rehearsal": chosen.rehearse, "checks": found})
    print(table(found))
    return int(any(result["outcome"] in ("failed", "no end") for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
