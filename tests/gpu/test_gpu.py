"""The checks of this package as tests; without CUDA they are skipped, and a few rehearsed on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.__main__ import CHECKS, LONGEST_S, in_child, main

ON_RAY = ("encode_killed", "device_assert", "chain")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name: str) -> None:
    found = in_child(name, rehearsal=False, seconds=LONGEST_S)
    print(found["lines"])
    assert found["outcome"] == "passed", found["words"]


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.ray, pytest.mark.slow] if n in ON_RAY else [])
        for n in CHECKS
        if n != "short_of_memory"  # of which a CPU can show nothing
    ],
)
def test_rehearsed_on_a_cpu(name: str) -> None:
    """The checks themselves are sound; what they find about a GPU is another matter."""
    found = in_child(name, rehearsal=True, seconds=LONGEST_S)
    assert found["outcome"] == "passed", found["words"]
    assert found["lines"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
