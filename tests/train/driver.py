"""A training job in a process of its own, watched and disturbed from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.storage.root import Root
from pipeline.train.checkpoint import list_complete
from pipeline.train.config import TrainJobConfig


class Driver:
    """A job in a process of its own, on a Ray of its own unless `env` names a cluster."""

    def __init__(self, config: TrainJobConfig, tmp_path: Path, env: Mapping[str, str] | None = None) -> None:
        self.config, self.root = config, Root(config.output.uri)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config.model_dump(mode="json")))
        repository = Path(__file__).parents[2]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": str(repository), **(env or {})}
        self.log_path = tmp_path / "driver.log"
        self.log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.drive", str(file)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def wait_until(self, condition: Callable[[], Any], what: str, timeout_s: float = 1200) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            assert self.process.poll() is None, f"the driver ended before {what}: {self.said()}"
            time.sleep(0.1)
        raise AssertionError(f"timed out waiting for {what}: {self.said()}")

    def said(self) -> str:
        return self.log_path.read_text()[-3000:]

    def has_checkpoint_before(self, images: int) -> bool:
        """A checkpoint is complete, and the end is not near."""
        done = list_complete(self.root.child("checkpoints"))
        return bool(done) and 0 < done[-1].images < images

    def workers(self) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for process in family:
            try:
                if any("RayTrainWorker" in part for part in process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def answer(self) -> tuple[int, dict[str, Any] | None]:
        out, _ = self.process.communicate(timeout=1800)
        lines = out.decode().strip().splitlines()
        return self.process.returncode, json.loads(lines[-1]) if lines else None

    def end(self) -> None:
        """Stop it and what it started, whatever it is doing."""
        family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)] if self.running else []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()
        self.log.close()

    @property
    def running(self) -> bool:
        """Whether the driver itself is still there."""
        return self.process.poll() is None
