"""Where a check works: its folder, its device, and how it runs the product's jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu.device import Bench, datasheet_peak, measured_peak
from tests.benchmarks.gpu.encode import make_vae
from tests.benchmarks.gpu.shapes import FULL, QUICK, Scale
from tests.benchmarks.photographs import made_up
from tests.support.jobs import run

Figure = float | str | None
Lines = dict[str, dict[str, Figure]]  # case -> its figures


@dataclass(frozen=True)
class Ground:
    """place: an empty folder. rehearsal: on a CPU, tiny. env: what jobs are started with."""

    place: Path
    rehearsal: bool
    env: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """What is computed on."""
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def scale(self) -> Scale:
        """Sizes of networks and batches."""
        return QUICK if self.rehearsal else FULL

    @property
    def side(self) -> int:
        """Pixels along a side of what the jobs encode."""
        return 32 if self.rehearsal else 256

    def bench(self, *, compiled: bool = False) -> Bench:
        """The device's clock; its peak is measured where there is one."""
        dtype = "float32" if self.rehearsal else "bfloat16"
        bench = Bench(self.device, dtype, (compiled,), warmup=1, peak=1.0)
        if not self.rehearsal:
            bench.peak, _ = measured_peak(bench, (8192,), rounds=3)
            bench.datasheet = datasheet_peak(self.device)
        return bench

    def images(self, count: int) -> Path:
        """A folder of so many different JPEGs."""
        folder = self.place / "images"
        folder.mkdir(exist_ok=True)
        pictures = made_up(24)
        for number in range(count):
            # Other bytes, other pixels: no two rows may pass for each other.
            pictures[number % 24].putpixel((number % 512, number // 512 % 384), (number % 251, 0, 255))
            pictures[number % 24].save(folder / f"{number:05d}.jpg", quality=92)
        return folder

    def codec(self) -> Path:
        """A codec of Stable Diffusion's shape with random weights; a tiny one in a rehearsal."""
        shape = next(iter(self.scale.codecs.values()))
        cpu = Bench(torch.device("cpu"), "float32", (False,), warmup=0)
        make_vae(cpu, shape).save_pretrained(self.place / "codec", safe_serialization=True)
        return self.place / "codec"

    def arguments(self, job: str, settings: dict[str, Any]) -> list[str]:
        """Of a job's command: quiet, and computing as this check does."""
        common: dict[str, Any] = {"tracking.enabled": "false"}
        if job in ("encode", "train", "sample"):
            common |= {"cluster.dashboard": "false", "cluster.device": "cpu" if self.rehearsal else "cuda"}
        return [f"{key}={value}" for key, value in {**common, **settings}.items()]

    def job(self, job: str, **settings: Any) -> dict[str, Any]:
        """Run a job to its end; its last line. Fails where it does not end with 0."""
        code, answer, errors = run(job, *self.arguments(job, settings), cwd=self.place, env=self.env)
        assert code == 0, f"jobs.{job} ended with {code}: {answer.get('error')}\n{errors[-3000:]}"
        return answer

    def encode_settings(self, output: str, **changes: Any) -> dict[str, Any]:
        """Of an encode job over `images` with `codec`."""
        return {
            "source.kind": "folder",
            "source.uri": self.place / "images",
            "image.resolution": self.side,
            "image.multiple_of": 8,
            "codec.path": self.place / "codec",
            "output.uri": self.place / output,
            **changes,
        }
