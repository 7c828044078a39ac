"""One model on many ranks: DDP or FSDP2, compiled or not.

Wrapping keeps the parameters' names, so a checkpoint does not depend on any of these choices.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pipeline.train import collectives
from pipeline.train.loop import Engine


def wrap(
    model: nn.Module,
    *,
    device: torch.device,
    strategy: str = "ddp",
    precision: str = "fp32",
    compiled: bool = False,
    blocks: Sequence[nn.Module] = (),
) -> Engine:
    """Move `model` to its device and make it ready to train on this rank; changes it in place.

    strategy: "ddp" or "fsdp2" (ValueError otherwise); in a single process "ddp" is the model itself.
    blocks: the repeated parts, compiled and sharded one by one; without them the model is one part.
    """
    if strategy not in ("ddp", "fsdp2"):
        raise ValueError(f"strategy {strategy!r}: there are ddp and fsdp2")
    model.to(device)
    if compiled:
        for module in blocks or [model]:
            module.compile()
    if strategy == "fsdp2":
        return _sharded(model, device, precision, blocks)
    if collectives.world_size() == 1:
        return Engine(forward=model, device=device)
    # Every rank computes its buffers alike: they are not sent around before each forward pass. Before torch 2.13 the
    # argument that says so had another name.
    named = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    no_sync: dict[str, Any] = {name: False}
    wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **no_sync)

    def without_sync(hold: bool) -> AbstractContextManager[Any]:
        return wrapped.no_sync() if hold else nullcontext()

    return Engine(forward=wrapped, without_sync=without_sync, device=device)


def _sharded(model: nn.Module, device: torch.device, precision: str, blocks: Sequence[nn.Module]) -> Engine:
    if not collectives.is_distributed():
        raise ValueError("strategy 'fsdp2' needs a process group")
    mesh = init_device_mesh(device.type, (collectives.world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        # Inputs are autocast's to cast: times and rotations in bfloat16 would be other times and places.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Also the root: between steps parameters are then always the sharded ones, whoever ran a forward pass.
    sharded = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

    @contextmanager
    def without_sync(hold: bool) -> Iterator[None]:
        sharded.set_requires_gradient_sync(not hold)
        yield

    return Engine(forward=model, without_sync=without_sync, device=device)
