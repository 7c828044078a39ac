"""Training steps a second against a bare loop, the reference DiT against diffusers', and the price of a kill.

    python -m tests.benchmarks.train_step [--steps 40] [--batch-size 8] [--compile] [--kill] [--before COMMIT]
        [--out DIR]

loop    the job's own code on one rank (stream from disk, keyed noise and times, guard, clip, EMA, history) against a
        loop over one batch of float32 tensors in memory with torch.randn, torch.rand, clip and fused AdamW. The same
        DiT, batch and steps. Target: at least 0.95.
DiT     forward and backward of one batch, against diffusers' DiTTransformer2DModel of equal width, depth and heads:
        as it is, and with what diffusers' does not have left out (rotary positions, normalised queries and keys);
        with `--before` also as an earlier commit had it, with `--compile` also compiled.
kill    (--kill) a job of two workers on a local Ray; one is killed with SIGKILL: seconds until the restarted workers
        have taken a checkpoint, twenty steps after the one that they go on from.

The sides take turns step by step, since a machine's speed may change from one second to the next; a ratio is the
median over the turns. First steps are left out. What the job does on threads of its own, reading some
hundred rows, goes on in the bare loop's turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from pipeline.config import merge, validate
from pipeline.model.config import ModelConfig
from pipeline.model.load import build_model
from pipeline.storage.root import Root
from pipeline.store.read.dataset import LatentDataset
from pipeline.train.checkpoint import list_complete
from pipeline.train.checks import handshake
from pipeline.train.config import TrainJobConfig
from pipeline.train.start import Start
from pipeline.train.state import make_state
from pipeline.train.worker import WorkerContext, run_worker
from tests.benchmarks.report import panels, table, write
from tests.support.training import new_start
from tests.train.dataset import make_dataset

CHANNELS, SIDE, CLASSES = 4, 32, 10
JOB, BARE, DIFFUSERS = "ours: the job's loop", "bare loop", "diffusers"
MODEL = {"kind": "dit", "hidden": 192, "depth": 4, "heads": 3, "patch": 2}
_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)


def settings(folder: Path, data: str, args: argparse.Namespace) -> dict[str, Any]:
    """The job's configuration: a report at every step, so that the sides can take turns."""
    return {
        "data": {"uri": data},
        "output": {"uri": str(folder / "run")},
        "model": MODEL,
        "train": {
            "images": args.steps * args.batch_size,
            "batch_size": args.batch_size,
            "micro_batch": args.batch_size,
            "log_images": args.batch_size,
            "device": args.device,
            "num_cpus": args.threads,
            "precision": args.precision,
        },
        "stream": {"lanes": 1},
        "checkpoint": {"every_images": 1 << 40},
        "tracking": {"enabled": False},
    }


def loop_seconds(data: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step of the job's loop and of a bare one, of which each does a step when the other has."""
    device, bare = torch.device(args.device), BareLoop(args)
    seconds: dict[str, list[float]] = {JOB: [], BARE: []}
    begun = now(device)

    def turn(figures: Mapping[str, float]) -> None:
        """Called by the job when a step is done and reported; its next one begins when this returns."""
        nonlocal begun
        if "images_per_s" in figures:
            seconds[JOB].append(now(device) - begun)
            seconds[BARE].append(bare.step())
            begun = now(device)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = validate(TrainJobConfig, settings(folder, data, args))
        facts = handshake(Start(config), LatentDataset.open(data))
        generation = new_start(Root(config.output.uri))
        run_worker(
            config, WorkerContext(args.device, generation, None, facts, True, folder / "scratch", publish=turn)
        )
    return {side: values[1:] for side, values in seconds.items()}


class BareLoop:
    """Training steps on one batch without anything around them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.autocast = torch.device(args.device), args.precision == "bf16"
        self.model = build().to(self.device)
        self.state = make_state(self.model, tracks=(), seed=0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
        for group in self.state.optimizer.param_groups:
            group["lr"] = 1e-4
        self.x = torch.randn(args.batch_size, CHANNELS, SIDE, SIDE, device=self.device)
        self.labels = torch.randint(CLASSES, (args.batch_size,), device=self.device)

    def step(self) -> float:
        """Seconds of one more step."""
        x, start = self.x, now(self.device)
        noise, t = torch.randn_like(x), torch.rand(len(x), device=self.device)
        at = t.view(-1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = (self.model((1 - at) * x + at * noise, t, self.labels).float() - (noise - x)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        assert float(norm) >= 0.0  # whoever clips looks at it
        return now(self.device) - start


def build(**changes: Any) -> nn.Module:
    """The model of all sides."""
    torch.manual_seed(0)
    config = _MODEL.validate_python({**MODEL, **changes})
    return build_model(config, latent_channels=CHANNELS, num_classes=CLASSES, text_dim=None)


def plain() -> nn.Module:
    """The same with the positions of diffusers', its queries and keys as they come."""
    return build(position="sincos", qk_norm=False)


def compiled() -> nn.Module:
    """The same, compiled at its first pass, which is not counted."""
    model = build()
    model.compile(dynamic=False)
    return model


def dit_before(commit: str) -> nn.Module:
    """The model as it was written at a commit."""
    source = subprocess.run(
        ["git", "show", f"{commit}:pipeline/model/dit.py"], check=True, capture_output=True, text=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dit_before.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    torch.manual_seed(0)
    size = {key: value for key, value in MODEL.items() if key != "kind"}
    model: nn.Module = module.DiT(latent_channels=CHANNELS, num_classes=CLASSES, **size)
    return model


def diffusers_dit() -> nn.Module:
    """diffusers' own, of equal size, its label dropout off."""
    heads = int(MODEL["heads"])  # type: ignore[call-overload]
    size = {"heads": heads, "head_dim": int(MODEL["hidden"]) // heads, "depth": MODEL["depth"]}  # type: ignore[call-overload]
    config = {"kind": "dit_transformer2d", "sample_size": SIDE, "patch": MODEL["patch"], **size}
    torch.manual_seed(0)
    return build_model(_MODEL.validate_python(config), latent_channels=CHANNELS, num_classes=CLASSES, text_dim=None)


def pass_seconds(models: Mapping[str, nn.Module], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each forward and backward of the models, which take turns, every other time in reverse."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch_size, CHANNELS, SIDE, SIDE, device=device)
    t = torch.full((args.batch_size,), 0.5, device=device)
    labels = torch.zeros(args.batch_size, dtype=torch.int64, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.steps):
        for name, model in list(models.items())[:: -1 if turn % 2 else 1]:
            start = now(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                loss = model(x, t, labels).float().square().mean()
            loss.backward()
            model.zero_grad(set_to_none=True)
            seconds[name].append(now(device) - start)
    return {name: values[1:] for name, values in seconds.items()}


def now(device: torch.device) -> float:
    """The clock, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def restart_cost() -> dict[str, float]:
    """Seconds from a worker's SIGKILL to the next checkpoint, which is twenty steps after the one gone on from."""
    from tests.train.driver import Driver
    from tests.train.job_config import job_config

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_dataset(folder / "latents")
        length = {"train": {"images": 16 * 2000, "num_workers": 2, "log_images": 16}}
        every = {"checkpoint": {"every_images": 16 * 20}}
        driver = Driver(job_config(folder, data, merge(length, every)), folder)
        checkpoints = driver.root.child("checkpoints")
        try:
            driver.wait_until(lambda: list_complete(checkpoints), "a checkpoint")
            worker = driver.wait_until(driver.workers, "a worker")[-1]
            before = list_complete(checkpoints)[-1].start
            worker.kill()
            killed = time.monotonic()
            driver.wait_until(lambda: list_complete(checkpoints)[-1].start > before, "a checkpoint of the restart")
            return {"seconds": time.monotonic() - killed}
        finally:
            driver.end()


def models_of(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The models whose passes are measured, by name."""
    models = {"ours": build(), "ours without norm and rotation": plain(), DIFFUSERS: diffusers_dit()}
    if args.before:
        models[f"ours at {args.before}"] = dit_before(args.before)
    if args.compile:
        models["ours compiled"] = compiled()
    return {name: model.to(args.device) for name, model in models.items()}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="the DiT compiled, too; needs a C++ compiler")
    parser.add_argument("--kill", action="store_true", help="measure the restart, too: starts Ray")
    parser.add_argument("--before", metavar="COMMIT", help="an earlier commit, whose DiT runs, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: two at least, as the first is not counted")
    return args


def main() -> None:
    """Measure and print."""
    args = arguments()
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        data = make_dataset(Path(name), rows=max(256, 4 * args.batch_size), classes=CLASSES, side=SIDE)
        measured = {BARE: loop_seconds(data, args), DIFFUSERS: pass_seconds(models_of(args), args)}
    report: dict[str, Any] = {"settings": {**vars(args), "out": None}, "steps": measured, "sides": {}}
    rows: list[list[Any]] = []
    for base, sides in measured.items():
        for side, seconds in sides.items():
            ratio = statistics.median(its / mine for its, mine in zip(sides[base], seconds, strict=True))
            figures = {"steps_per_s": 1 / statistics.median(seconds), "ratio": ratio, "of": base}
            report["sides"][side] = figures
            rows.append([side, *figures.values()])
    print(table(["", "steps/s", "ratio", "of"], rows))
    if args.kill:
        report["restart"] = restart_cost()
        print(f"a killed worker: {report['restart']}")
    write(args.out, "train_step", report)
    titles = {BARE: "steps/s", DIFFUSERS: "forward + backward passes/s of a DiT"}
    parts = {
        title: {side: report["sides"][side]["steps_per_s"] for side in measured[base]}
        for base, title in titles.items()
    }
    panels(args.out, "train_step", f"training, batches of {args.batch_size}", parts)


if __name__ == "__main__":
    main()
