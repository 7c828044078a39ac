"""A small training job over a small dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import merge, validate
from pipeline.train.config import TrainJobConfig


def job_config(tmp_path: Path, data_uri: str, changes: dict[str, Any] | None = None) -> TrainJobConfig:
    base = {
        "data": {"uri": data_uri},
        "output": {"uri": str(tmp_path / "run")},
        "model": {"kind": "dit", "hidden": 16, "depth": 2, "heads": 2, "patch": 2},
        "train": {
            "images": 320,
            "batch_size": 16,
            "learning_rate": 0.002,
            "warmup_images": 64,
            "decay_images": 128,
            "log_images": 32,
            "num_workers": 1,
            "device": "cpu",
            "seed": 3,
        },
        "stream": {"lanes": 4},
        "checkpoint": {"every_images": 64},
        "cluster": {"num_cpus": 4, "dashboard": False},
        "tracking": {"enabled": False},
    }
    return validate(TrainJobConfig, merge(base, changes or {}))
