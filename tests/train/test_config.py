"""The training job's configuration: its rules, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from tests.train.job_config import job_config


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"train": {"batch_size": 2, "num_workers": 4}}, r"batch_size 2 must be at least num_workers 4"),
        ({"train": {"min_workers": 2}}, r"min_workers 2 must not exceed num_workers 1"),
        (
            {"train": {"num_workers": 3}},
            r"stream.lanes 4 must be a multiple of every number of workers, not so \[3\]",
        ),
        ({"train": {"num_workers": 4, "min_workers": 2}}, r"not so \[3\]"),
        ({"train": {"ema": [{"name": "a"}]}}, r"exactly one of sigma_rel and half_life_images"),
        (
            {"train": {"ema": [{"name": "a", "sigma_rel": 0.1}, {"name": "a", "sigma_rel": 0.2}]}},
            r"ema names must differ",
        ),
        (
            {"train": {"optimizer": "muon", "strategy": "fsdp2"}},
            "optimizer muon needs whole matrices: set strategy=ddp, not fsdp2",
        ),
        (
            {"train": {"optimizer": "schedule_free", "decay_images": 8}},
            "decay_images 8 must be 0 with optimizer schedule_free",
        ),
        ({"validation": {"images": 8}}, r"validation.images 8 needs stream.holdout above 0"),
        ({"grid": {"every_images": 8}, "train": {"ema": []}}, r"needs at least one train.ema track"),
        (
            {"grid": {"every_images": 8, "sampler": {"name": "heun"}}, "objective": {"kind": "v"}},
            r"grid.sampler.name: heun serves the objective flow; for v use ddim or dpmpp",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rule):
        job_config(tmp_path, "x", changes)


def test_the_configuration_and_the_finished_path_import_nothing_heavy() -> None:
    code = (
        "import sys, pipeline.train.config, pipeline.train.job; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'diffusers', 'PIL') if m in sys.modules])"
    )
    repository = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
