"""What the ranks of one training run say to each other; every function is the identity in a single process.

Values travel as tensors of JSON bytes, so that nothing received is ever unpickled.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def group_device() -> torch.device:
    """Where collectives of this group want their tensors."""
    if is_distributed() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if is_distributed():
        total(torch.zeros(1))


def total(values: Tensor) -> Tensor:
    """Sum over ranks, on the caller's device and in its dtype; a new tensor."""
    if world_size() == 1:
        return values.clone()
    out = values.to(group_device(), copy=True)
    dist.all_reduce(out, op=dist.ReduceOp.SUM)
    return out.to(values.device)


def all_true(value: bool) -> bool:
    """Whether every rank says yes."""
    return int(total(torch.tensor([0 if value else 1]))[0]) == 0


def gather_json(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(group_device())
    size = torch.tensor([data.numel()], device=data.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    rows = [torch.zeros_like(padded) for _ in range(world_size())]
    dist.all_gather(rows, padded)
    return [json.loads(bytes(r[: int(s)].cpu().numpy())) for r, s in zip(rows, sizes, strict=True)]


def broadcast_json(value: Any) -> Any:
    """Rank 0's value on every rank; what the others pass is ignored."""
    return gather_json(value if rank() == 0 else None)[0]
