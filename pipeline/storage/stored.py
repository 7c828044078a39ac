"""Documents read back from storage: JSON becomes a typed value here, or an input error that names file and field.

What was written once may have been cut short, edited or exchanged since, by accident or on purpose. A shape is what
the readers of a document use of it; whoever meets a value behind one may rely on its type. Of safetensors
files heads and single small tensors are read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import InputError
from pipeline.storage.errors import RESTORE, unreadable
from pipeline.storage.root import Root, check_key

T = TypeVar("T")
OPEN = ConfigDict(strict=True, extra="allow")  # of documents that carry along what other readers use
Key = Annotated[str, AfterValidator(check_key)]  # names an object below the document's own root
Count = Annotated[int, Field(ge=0, lt=1 << 63)]  # what an int64 of Arrow and numpy holds
OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_SHOWN = 5


def parse(shape: TypeAdapter[T], data: bytes, where: str, *, key: str | None = None, next_step: str = RESTORE) -> T:
    """The typed value of a JSON document; InputError names `where` it lies and every field that breaks the shape."""
    try:
        return shape.validate_json(data)
    except ValidationError as error:
        raise unreadable(where, problems(error), key=key, next_step=next_step) from None


def read_stored(shape: TypeAdapter[T], root: Root, name: str, *, key: str | None = None) -> T:
    """The typed value of a stored JSON document; FileNotFoundError when it is absent, InputError as `parse`."""
    return parse(shape, root.read_bytes(name), root.uri_of(name), key=key)


def read_required(shape: TypeAdapter[T], root: Root, name: str) -> T:
    """As `read_stored`, of a document that another one names: InputError when it is absent, too."""
    try:
        return read_stored(shape, root, name)
    except FileNotFoundError:
        raise unreadable(root.uri_of(name), "it is gone") from None


def problems(error: ValidationError) -> str:
    """The fields of a document that are not as they must be, in one line."""
    found = [f"{'.'.join(map(str, e['loc'])) or 'the document'}: {e['msg']}" for e in error.errors(include_url=False)]
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(text[:200] for text in found[:_SHOWN]) + more


# -- Weight files: heads, and single small tensors by ranged reads. Safetensors only, no torch -------------------


_MAX_HEAD_BYTES = 100 << 20  # the format's own limit


def tensor_head(root: Root, name: str, path: str) -> dict[str, Any]:
    """The head of a safetensors file: its tensors by name. InputError unless the file is as long as it says."""
    size = root.info(name).size_bytes
    if size < 8:
        _broken(name, f"it has {size} bytes", path)
    (length,) = struct.unpack("<Q", root.read_range(name, 0, 8))
    if length > min(size - 8, _MAX_HEAD_BYTES):
        _broken(name, f"its header claims {length} bytes", path)
    try:
        head: dict[str, Any] = json.loads(root.read_range(name, 8, length))
        ends = [int(v["data_offsets"][1]) for k, v in head.items() if k != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        _broken(name, f"its header is unreadable ({type(error).__name__})", path)
    end = 8 + length + max(ends, default=0)
    if end != size:
        _broken(name, f"it has {size} bytes, its header describes {end}", path)
    return head


def _broken(name: str, why: str, path: str) -> NoReturn:
    raise InputError(
        f"The weight file {name} is broken: {why}",
        key="path",
        value=path,
        rule="a safetensors file is as long as its header says",
        next_step="copy or download it again",
    )


def _read_tensor(root: Root, names: Sequence[str], tensor: str, path: str) -> npt.NDArray[np.float64]:
    for name in names:
        head = tensor_head(root, name, path)
        if tensor not in head:
            continue
        try:
            (start, stop), dtype = head[tensor]["data_offsets"], head[tensor]["dtype"]
            (length,) = struct.unpack("<Q", root.read_range(name, 0, 8))
            data = root.read_range(name, 8 + length + start, stop - start)
            if dtype == "BF16":  # the upper half of a float32
                values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
            elif dtype in ("F16", "F32", "F64"):
                values = np.frombuffer(data, "<f" + str(int(dtype[1:]) // 8))
            else:
                raise ValueError(f"statistics of type {dtype}")
            return values.astype(np.float64).reshape(head[tensor]["shape"])
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            _broken(name, f"its tensor {tensor} is unreadable ({error})", path)
    raise InputError(f"The weights hold no tensor {tensor}", key="path", value=path)


def batch_norm_scale(root: Root, names: Sequence[str], eps: float, path: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel that the batch norm `bn` of a network takes for those of its input.

    names: the weight files that may hold it; path: what errors call the place. InputError where none does, ValueError
    for variances that are none.
    """
    mean, var = (_read_tensor(root, names, f"bn.running_{which}", path) for which in ("mean", "var"))
    if mean.shape != var.shape or not (var + eps > 0).all():
        raise ValueError("the statistics of a batch norm are a mean and a positive variance per channel")
    return mean.tolist(), np.sqrt(var + eps).tolist()
