"""`python -m jobs.quickstart`: the whole journey on this machine, in minutes, as its user would type it.

Writes pictures of coloured shapes, fits a small VAE, encodes, trains, samples and evaluates, each by the ordinary
command with a configuration from configs/quickstart/. Everything lands in ./quickstart/. What an earlier run
finished is recognised and skipped; what it left half done is resumed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config import SHIPPED

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
    from pipeline.progress import Progress
    from pipeline.source.synthetic import write_shapes

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


if __name__ == "__main__":
    main()
