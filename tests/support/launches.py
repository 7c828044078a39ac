"""What work would ask of a GPU, counted without one: it runs on the `meta` device, of shapes without values.

A launch is an operation on tensors of the device that is neither a view nor an allocation; a foreach or fused
operation is one. A blocking upload is a copy from pageable host memory that the host waits for: `torch.tensor(...,
device=...)` is one, too. A synchronisation makes the host wait for all that the device was given: a value read, a
copy back, a selection whose size depends on values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach"}
_BY_VALUE = {"nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero", "bincount"}
_COPIES = {"_to_copy", "copy_"}


@dataclass(eq=False)
class Launches(TorchDispatchMode):
    """Counts while it is entered; what is read from the device is 0, for it has no values."""

    launches: Counter[str] = field(default_factory=Counter)
    blocking_uploads: int = 0
    uploads: int = 0
    synchronisations: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()
        self._calls = _Constructed(self)

    def __enter__(self) -> Launches:
        self._calls.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(tensor.is_meta for tensor in given) or kwargs.get("device") == META
        if not here or name in _ALLOCATIONS or _is_view(func):
            return func(*args, **kwargs)
        if name in _COPIES:
            return self._copy(func, args, kwargs)
        if name == "_local_scalar_dense":
            self.synchronisations[name] += 1
            return 0.0 if args[0].is_floating_point() else 0
        by_mask = name in ("index", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in _BY_VALUE or by_mask:
            self.synchronisations[name] += 1
        self.launches[name] += 1
        return None if name.startswith("_fused_") else func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        to_host = args[0].is_meta and kwargs.get("device", META).type == "cpu"
        into_host = len(args) > 1 and isinstance(args[1], Tensor) and args[1].is_meta and not args[0].is_meta
        if to_host or into_host:
            self.synchronisations["copy to the host"] += 1
            if to_host:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
            return args[0].zero_()
        source = args[1] if func.overloadpacket.__name__ == "copy_" else args[0]
        if source.is_meta:
            self.launches[func.overloadpacket.__name__] += 1
        elif kwargs.get("non_blocking", False):
            self.uploads += 1
        else:
            self.blocking_uploads += 1
        return func(*args, **kwargs)


class _Constructed(TorchFunctionMode):
    """Sees what never reaches the dispatcher on `meta`: tensors made of Python's values on the device."""

    def __init__(self, counts: Launches) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and made.is_meta:
            self._counts.blocking_uploads += 1
        return made


def _is_view(func: Any) -> bool:
    """Whether what comes out shares what went in, unchanged."""
    results = func._schema.returns
    return func.overloadpacket.__name__ == "_unsafe_view" or any(
        result.alias_info is not None and not result.alias_info.is_write for result in results
    )
