"""What torch.compile is told, on the torch that is installed and on those before it had a limit of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.diffusion.compiled import compile_for_shapes


class Noting(torch.nn.Module):
    told: dict[str, Any]

    def compile(self, *args: Any, **options: Any) -> None:
        self.told = options


def test_the_limit_of_shapes_is_told_in_the_way_that_the_installed_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Noting()
    compile_for_shapes(module, 64)
    assert module.told == {"dynamic": False, "recompile_limit": 64}

    def without_limit(model: Any = None, *, dynamic: bool | None = None) -> Any:
        return model

    monkeypatch.setattr(torch, "compile", without_limit)  # as in 2.11
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_for_shapes(module, 64)
        assert module.told == {"dynamic": False}
        assert torch._dynamo.config.recompile_limit == 64
