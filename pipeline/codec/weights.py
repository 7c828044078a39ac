"""Weight files of a codec: which they are, their hashes, single small tensors. Safetensors only, no torch."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.storage.root import Root

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK_BYTES = 8 << 20
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file with its size and hash."""

    name: str
    size_bytes: int
    sha256: str


def weight_files(root: Root, path: str) -> list[WeightFile]:
    """The weight files at `root`, checked for completeness and hashed; InputError says what is wrong."""
    return [_hash(root, name, path) for name in _names(root, path)]


def _names(root: Root, path: str) -> list[str]:
    if root.exists(WEIGHTS):
        return [WEIGHTS]
    if root.exists(INDEX):
        return _shards(root, path)
    found = sorted(o.key for o in root.list() if "/" not in o.key)
    if any(name.endswith(_PICKLE) for name in found):
        raise InputError(
            "The codec's weights are pickled, and unpickling runs code from the file",
            key="codec.path",
            value=path,
            rule=f"weights are read from {WEIGHTS} only",
            next_step="where you trust the file, convert it once: AutoencoderKL.from_pretrained(path)"
            ".save_pretrained(new_path), then set codec.path=new_path",
        )
    raise InputError(
        f"The codec directory is incomplete: it holds {', '.join(found)} and no weights",
        key="codec.path",
        value=path,
        rule=f"weights are read from {WEIGHTS}",
        next_step="copy the missing file, or rename the variant to be used",
    )


def _shards(root: Root, path: str) -> list[str]:
    try:
        names = sorted(set(json.loads(root.read_bytes(INDEX))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"The index {INDEX} cannot be read: {error!r}", key="codec.path", value=path) from error
    # A name with a slash would lead out of the directory.
    missing = [n for n in names if "/" in n or "\\" in n or not n.endswith(".safetensors") or not root.exists(n)]
    if missing or not names:
        raise InputError(
            f"The index {INDEX} names files that are not there: {', '.join(missing) or 'none at all'}",
            key="codec.path",
            value=path,
            next_step="copy the missing files",
        )
    return names


def _hash(root: Root, name: str, path: str) -> WeightFile:
    size = root.info(name).size_bytes
    _, end = _header(root, name, size, path)
    if end != size:
        _broken(name, f"it has {size} bytes, its header describes {end}", path)
    digest = hashlib.sha256()
    with root.open(name) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return WeightFile(name, size, digest.hexdigest())


def _header(root: Root, name: str, size: int, path: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the file size that it implies."""
    if size < 8:
        _broken(name, f"it has {size} bytes", path)
    (length,) = struct.unpack("<Q", root.read_range(name, 0, 8))
    if length > min(size - 8, _MAX_HEADER_BYTES):
        _broken(name, f"its header claims {length} bytes", path)
    try:
        header: dict[str, Any] = json.loads(root.read_range(name, 8, length))
        ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        _broken(name, f"its header is unreadable ({type(error).__name__})", path)
    return header, 8 + length + max(ends, default=0)


def _broken(name: str, why: str, path: str) -> NoReturn:
    raise InputError(
        f"The weight file {name} is broken: {why}",
        key="codec.path",
        value=path,
        rule="a safetensors file is as long as its header says",
        next_step="copy or download it again",
    )


def read_tensor(root: Root, names: list[str], tensor: str, path: str) -> npt.NDArray[np.float64]:
    """One small floating-point tensor out of the weight files, by ranged reads."""
    for name in names:
        header, _ = _header(root, name, root.info(name).size_bytes, path)
        if tensor in header:
            entry = header[tensor]
            start, stop = entry["data_offsets"]
            (length,) = struct.unpack("<Q", root.read_range(name, 0, 8))
            data = root.read_range(name, 8 + length + start, stop - start)
            return _as_float64(data, entry["dtype"], name, path).reshape(entry["shape"])
    raise InputError(f"The weights hold no tensor {tensor}", key="codec.path", value=path)


def _as_float64(data: bytes, dtype: str, name: str, path: str) -> npt.NDArray[np.float64]:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if dtype in ("F16", "F32", "F64"):
        return np.frombuffer(data, "<f" + str(int(dtype[1:]) // 8)).astype(np.float64)
    _broken(name, f"statistics of type {dtype}", path)
