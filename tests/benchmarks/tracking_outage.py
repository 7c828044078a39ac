"""What tracking costs a training step while the MLflow server is up, killed and frozen.

    python -m tests.benchmarks.tracking_outage [--steps 400] [--rounds 3] [--out DIR]

A small DiT is trained on the CPU against a real `mlflow server` (sqlite). Every step logs twenty figures, as rank 0
of a training job does each time it logs. Steps take turns: one logs to the server's tracker, the next to one that
records nothing; so both see the same machine and the same state of the server:

    up        it answers
    killed    SIGKILL: connections are refused
    frozen    SIGSTOP: connections are taken and never answered

Told are median and 99th percentile of the log call and of the whole step, and the ratio of the steps' medians. In the
end the server is brought back, and every point that was logged is looked for: none may be missing or doubled.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.model.dit import DiT
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.delivery import replay
from pipeline.tracking.journal import journals
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import NoopTracker, Tracker, open_tracker
from tests.benchmarks.report import bars, table, write
from tests.support.mlflow_server import MlflowServer

FIGURES = 20
HEADS = ("server", "log call p50", "p99", "step p50", "p99", "untracked p50", "p99", "ratio of steps")


@dataclass
class Times:
    """Seconds of one state of the server: the log call, the step with it, the step without."""

    call: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        out = {}
        for name, values in (("log_call", self.call), ("step", self.step), ("untracked_step", self.bare)):
            out[f"{name}_p50_ms"] = 1e3 * statistics.median(values)
            out[f"{name}_p99_ms"] = 1e3 * statistics.quantiles(values, n=100)[98]
        return out | {"step_ratio": out["step_p50_ms"] / out["untracked_step_p50_ms"]}


def trainer() -> Callable[[], float]:
    """A training step of a small DiT on random latents; returns the loss."""
    torch.manual_seed(0)
    model = DiT(latent_channels=4, hidden=64, depth=2, heads=4, num_classes=8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, t, labels = torch.randn(8, 4, 8, 8), torch.rand(8), torch.randint(0, 8, (8,))

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = (model(x, t, labels) - x).square().mean()
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return step


def measure(step: Callable[[], float], tracker: Tracker, times: Times, first: int, steps: int) -> int:
    """Alternate tracked and untracked steps; the next number of a tracked step."""
    for number in range(first, first + steps):
        for target in (tracker, NoopTracker()):
            start = time.perf_counter()
            loss = step()
            before = time.perf_counter()
            target.log_metrics({f"figure/{i}": loss + i for i in range(FIGURES)}, step=number)
            end = time.perf_counter()
            if target is tracker:
                times.call.append(end - before)
                times.step.append(end - start)
            else:
                times.bare.append(end - start)
    return first + steps


def missing_points(uri: str, run_id: str | None, steps: int) -> dict[str, int]:
    """How many points of all figures are not at the server, and how many are there twice."""
    assert run_id is not None
    client: Any = MlflowStore(uri).client
    lost = doubled = 0
    for i in range(FIGURES):
        found = [m.step for m in client.get_metric_history(run_id, f"figure/{i}")]
        lost += len(set(range(steps)) - set(found))
        doubled += len(found) - len(set(found))
    return {"logged": steps * FIGURES, "lost": lost, "doubled": doubled}


def run(folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """All states in turn, `rounds` times."""
    server = MlflowServer(folder / "server")
    states = {"up": Times(), "killed": Times(), "frozen": Times()}
    step, number = trainer(), 0
    server.start()
    try:
        tracking = TrackingConfig(uri=server.uri, journal_dir=str(folder / "journal"), close_timeout_s=300.0)
        tracker = open_tracker(tracking, job="train", run_name="benchmark")
        if tracker.wait_run_id(120) is None:
            raise RuntimeError("the server did not take the run")
        measure(step, NoopTracker(), Times(), 0, 30)  # the first steps allocate
        for _ in range(rounds):
            number = measure(step, tracker, states["up"], number, steps)
            server.kill()
            number = measure(step, tracker, states["killed"], number, steps)
            server.start()
            server.freeze()
            number = measure(step, tracker, states["frozen"], number, steps)
            server.thaw()
        tracker.finish("FINISHED")
        left = len(journals(Path(tracking.journal_dir)))
        if left:  # a server too slow to take it all in time: what stays is sent as the next job would
            replay(tracking.journal_dir, tracking.uri)
        points = missing_points(server.uri, tracker.run_id, number) | {"journals_replayed": left}
    finally:
        server.kill()
    return {"states": {name: times.figures() for name, times in states.items()}, "points": points, "steps": number}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="tracked steps in each state and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for tracking_outage.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pipeline").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="tracking-outage-") as folder:
        figures = run(Path(folder), chosen.steps, chosen.rounds)
    rows = [[name, *values.values()] for name, values in figures["states"].items()]
    print(table(HEADS, rows), "\n(milliseconds)")
    points = figures["points"]
    print(f"points: {points['logged']:,} logged, {points['lost']:,} lost, {points['doubled']:,} doubled")
    write(chosen.out, "tracking_outage", figures)
    steps = {f"ours: server {name}": values["step_p50_ms"] for name, values in figures["states"].items()}
    steps["bare: no tracking"] = figures["states"]["up"]["untracked_step_p50_ms"]
    bars(chosen.out, "tracking_outage", "a training step, by what the tracking server does", steps, "ms")


if __name__ == "__main__":
    main()
