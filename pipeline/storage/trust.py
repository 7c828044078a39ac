"""What a received thing may make us do: which places written in data are followed, which files a library reads.

Of weight files heads and single small tensors are read here, by ranges; safetensors only, without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.storage.root import Root

# -- Places: a path, URI or hub id that stands in an image or a dataset is whatever its maker wrote ----------------


def key_below(uri: str, prefix: str) -> str | None:
    """The part of `uri` after `prefix`, without empty parts and "."; None when it lies elsewhere or climbs out."""
    start = prefix.rstrip("/") + "/"
    return tidy_key(uri[len(start) :]) if uri.startswith(start) else None


def tidy_key(key: str) -> str | None:
    """A relative name without empty parts and "."; None when a part is "..", however often it is encoded."""
    decoded, before = key, ""
    while decoded != before:  # a server decodes %2e%2e, and some of them %252e twice
        decoded, before = unquote(decoded), decoded
    if ".." in decoded.replace("\\", "/").split("/"):
        return None
    return "/".join(part for part in key.split("/") if part not in ("", "."))


def follow(places: Mapping[str, str], allowed: Sequence[str], *, written_in: str, allow_by: str) -> None:
    """InputError unless each of `places`, by the setting that would name it, is one of `allowed` or below one.

    `written_in` says where the places stand ("the image"); `allow_by` is the setting that holds `allowed`.
    """
    unasked = {
        setting: place
        for setting, place in places.items()
        if not any(_whole(place) == _whole(prefix) or key_below(_whole(place), _whole(prefix)) for prefix in allowed)
    }
    if unasked:
        settings = " ".join(f"{s}=[{place}]" if s == allow_by else f"{s}={place}" for s, place in unasked.items())
        raise InputError(
            f"A place is only named by {written_in}, and what data names is not gone to unasked",
            key=", ".join(unasked),
            value=", ".join(unasked.values()),
            rule="whoever made the data may have written any path, address or hub id there",
            next_step=f"where you trust it, add {settings}, or allow what lies below a prefix: {allow_by}=[PREFIX]",
        )


def _whole(place: str) -> str:
    """A path from the root of the disk on; a URI as it is. (A hub id passes for a path on both sides.)"""
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


# -- Sizes: a description asks for memory ---------------------------------------------------------------------------

_MOST_LAYERS, _MOST = 1 << 10, 1 << 20


def check_sizes(description: Any, name: str = "") -> None:
    """ValueError when the description of a network asks for sizes that none has: building it would never end."""
    if isinstance(description, dict):
        for field, value in description.items():
            check_sizes(value, str(field))
    elif isinstance(description, list | tuple):
        for value in description:
            check_sizes(value, name)
    elif isinstance(description, int) and abs(description) > (
        _MOST_LAYERS if "layers" in name or "depth" in name else _MOST
    ):
        raise ValueError(f"{name} {str(description)[:30]} is more than any network has")


# -- Files: what was hashed is what is loaded ----------------------------------------------------------------------


@contextlib.contextmanager
def only_these(files: Mapping[str, Path], texts: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A directory of links to `files` by name (it may hold "/") and of `texts`: for libraries that choose files.

    A library that is given a directory reads what it finds there: an index beside a single file, an adapter, weights
    that a configuration names. Here it finds nothing but what its caller has looked at. InputError when a file was
    changed or replaced between entry and exit: hash and load inside one block.
    """
    before = {name: _stamp(path) for name, path in files.items()}
    with tempfile.TemporaryDirectory(prefix="latentloom-files-") as folder:
        for name, path in files.items():
            link = Path(folder, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
        for name, text in (texts or {}).items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_text(text, encoding="utf-8")
        yield Path(folder)
        changed = sorted(name for name, path in files.items() if _stamp(path) != before[name])
    if changed:
        raise InputError(
            f"A file was changed while it was read: {', '.join(changed)}",
            key="path",
            value=files[changed[0]],
            rule="what is loaded is what was hashed",
            next_step="start again when nobody writes there",
        )


def _stamp(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# -- What a hub of models has: by an id, pinned to a revision, and of that the files that are asked for ----------


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_snapshot(
    repo: str, revision: str, patterns: Sequence[str], *, what: str, key: str, ignore: Sequence[str] = ()
) -> Path:
    """The local copy of a hub id's files that match, downloaded or found in the hub's cache.

    InputError, about `key`, naming `what` was wanted, when the hub does not give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=[*patterns], ignore_patterns=[*ignore] or None)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"The hub does not give {what}: {type(error).__name__}: {str(error).splitlines()[0]}",
            key=key,
            value=f"{repo} at revision {revision}",
            rule="a hub id must exist at its revision and be reachable or cached",
            next_step="check id, revision, network and HF_TOKEN, or download it and give the directory",
        ) from error


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
