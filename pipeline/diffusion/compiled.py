"""torch.compile, with what the installed torch has (2.11 to 2.13): for networks that meet several shapes, and for
arithmetic of many small operations.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")


def compile_for_shapes(module: nn.Module, num_shapes: int) -> None:
    """Compile a module in place, anew for each of up to `num_shapes` input shapes; torch's own limit is eight."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # from 2.13 on
        module.compile(dynamic=False, recompile_limit=num_shapes)
        return
    # Before, the limit was that of the process.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, num_shapes)
    module.compile(dynamic=False)


def fused_on_gpu(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function of tensors that takes few kernels on CUDA, and on other devices stays as it is written.

    Only for exact arithmetic, which compiled is the same: where nothing can be compiled (no Triton, no C compiler),
    it stays as it is written, too. Compiled once for all sizes above one; call it with gradients off.
    """
    compiled: Callable[_P, _R] | None = None
    works = True

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal compiled, works
        if not works or not any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        try:
            compiled = compiled or torch.compile(function, dynamic=True)
            # Autocast has no part in it, but another state of it would be compiled anew.
            with torch.autocast("cuda", enabled=False):
                return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _log.warning(
                "%s runs uncompiled, many times slower: %s", function.__name__, " ".join(str(error).split())[:300]
            )
            works = False
            return function(*args, **kwargs)

    return call
