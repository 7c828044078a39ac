"""What torch.compile is told, by the torch installed; and what is done where it cannot compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.diffusion.rng import fused_on_gpu
from pipeline.diffusion.samplers import compile_for_shapes


class Noting(torch.nn.Module):
    told: dict[str, Any]

    def compile(self, *args: Any, **options: Any) -> None:
        self.told = options


def test_the_limit_of_shapes_is_told_in_the_way_that_the_installed_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Noting()

    def with_limit(model: Any = None, *, dynamic: bool | None = None, recompile_limit: int | None = None) -> Any:
        return model

    def without_limit(model: Any = None, *, dynamic: bool | None = None) -> Any:
        return model

    monkeypatch.setattr(torch, "compile", with_limit)  # as in 2.13
    compile_for_shapes(module, 64)
    assert module.told == {"dynamic": False, "recompile_limit": 64}
    monkeypatch.setattr(torch, "compile", without_limit)  # as in 2.11
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_for_shapes(module, 64)
        assert module.told == {"dynamic": False}
        assert torch._dynamo.config.recompile_limit == 64


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return super().__torch_function__(*args, **kwargs)


def on_gpu(value: float) -> torch.Tensor:
    return torch.full((2,), value).as_subclass(OnGpu)


def test_what_is_fused_is_compiled_for_a_gpu_and_stays_as_it_is_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def compiler(function: Any, **options: Any) -> Any:
        calls.append(options)
        return lambda x: function(x) + 100

    monkeypatch.setattr(torch, "compile", compiler)
    doubled = fused_on_gpu(lambda x: 2 * x)
    assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert not calls
    assert [doubled(on_gpu(n)).tolist() for n in (1, 2)] == [[102, 102], [104, 104]]
    assert calls == [{"dynamic": True}], "once for all calls and sizes"


def test_where_nothing_compiles_it_runs_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def compiler(function: Any, **options: Any) -> Any:
        def fails(x: torch.Tensor) -> torch.Tensor:
            tries.append(x)
            raise torch._dynamo.exc.BackendCompilerFailed(compiler, RuntimeError("Failed to find C compiler"), None)

        return fails

    monkeypatch.setattr(torch, "compile", compiler)

    @fused_on_gpu
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert [doubled(on_gpu(n)).tolist() for n in (1, 2)] == [[2, 2], [4, 4]]
    assert len(tries) == 1, "it is not tried again"
    assert "doubled runs uncompiled" in caplog.text
    assert "C compiler" in caplog.text
