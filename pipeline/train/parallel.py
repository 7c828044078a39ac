"""One model on many ranks: DDP, FSDP2 or HSDP, compiled or not.

Wrapping keeps the parameters' names, so a checkpoint does not depend on any of these choices.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import ConfigError
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
    node: int = 0,
) -> Engine:
    """Move `model` to its device and make it ready to train on this rank; changes it in place.

    strategy: "ddp", "fsdp2" (sharded over all ranks) or "hsdp" (sharded within a node, replicated between nodes);
    ValueError otherwise; in a single process "ddp" is the model itself. blocks: the repeated parts, compiled and
    sharded one by one; without them the model is one part. node: on which this rank runs, of which "hsdp" needs as
    many ranks on each (ConfigError).
    """
    if strategy not in ("ddp", "fsdp2", "hsdp"):
        raise ValueError(f"strategy {strategy!r}: there are ddp, fsdp2 and hsdp")
    model.to(device)
    if compiled:
        for module in blocks or [model]:
            module.compile()
    if strategy != "ddp":
        if not collectives.is_distributed():
            raise ValueError(f"strategy {strategy!r} needs a process group")
        return _sharded(model, _mesh(device, strategy, node), device, precision, blocks)
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


def _mesh(device: torch.device, strategy: str, node: int) -> DeviceMesh:
    """All ranks in a row to shard over; for "hsdp" a row for each node, and copies of the shards down the columns."""
    if strategy == "fsdp2":
        return init_device_mesh(device.type, (collectives.world_size(),))
    nodes = collectives.gather_json(node)
    rows = [len(list(row)) for _, row in groupby(nodes)]
    if len(rows) != len(set(nodes)) or len(set(rows)) != 1:
        raise ConfigError(
            f"The {len(nodes)} workers are not spread evenly over nodes: theirs are {nodes}",
            key="train.strategy",
            value="hsdp",
            rule="each node has as many workers, of consecutive ranks: each holds all that is sharded",
            next_step="make train.num_workers a multiple of the GPUs of a node and leave out train.min_workers, or "
            "use train.strategy=fsdp2",
        )
    return init_device_mesh(device.type, (len(rows), rows[0]), mesh_dim_names=("replicate", "shard"))


def _sharded(
    model: nn.Module, mesh: DeviceMesh, device: torch.device, precision: str, blocks: Sequence[nn.Module]
) -> Engine:
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
