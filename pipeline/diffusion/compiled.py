"""torch.compile for networks that meet several shapes, with what the installed torch has (2.11 to 2.13)."""

from __future__ import annotations

import inspect

import torch
from torch import nn


def compile_for_shapes(module: nn.Module, num_shapes: int) -> None:
    """Compile a module in place, anew for each of up to `num_shapes` input shapes; torch's own limit is eight."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # from 2.13 on
        module.compile(dynamic=False, recompile_limit=num_shapes)
        return
    # Before, the limit was that of the process.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, num_shapes)
    module.compile(dynamic=False)
