"""The configuration models say the same as the classes they configure, and import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from pydantic import ValidationError

from pipeline.diffusion.config import ObjectiveConfig, SamplerConfig, TimestepConfig
from pipeline.diffusion.objectives import Objective, TimestepDensity
from pipeline.diffusion.samplers import _RUNS
from pipeline.diffusion.solvers import SOLVERS, SamplerName


def test_defaults_agree_with_the_classes() -> None:
    assert Objective(**ObjectiveConfig().model_dump()) == Objective()
    assert TimestepDensity(**TimestepConfig().model_dump()) == TimestepDensity()
    assert set(get_args(SamplerName)) == {"auto", *SOLVERS}
    assert set(_RUNS) == set(SOLVERS)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"beta_start 0.5 must not exceed beta_end 0.1"):
        ObjectiveConfig(beta_start=0.5, beta_end=0.1)
    with pytest.raises(ValidationError, match="must satisfy 0 <= low <= high <= 1"):
        SamplerConfig(guidance_interval=(0.9, 0.1))


@pytest.mark.integration
@pytest.mark.parametrize("module", ["pipeline.diffusion.config", "pipeline.model.config"])
def test_configuration_imports_no_torch(module: str) -> None:
    heavy = ("torch", "numpy", "diffusers", "ray", "mlflow")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
