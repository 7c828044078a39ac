"""From `codec.path` to the files of a codec: a local directory, an fsspec URI, or a hub id at a revision."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import InputError
from pipeline.storage.root import Root

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
_LAYOUT = "a codec is a directory with config.json and diffusion_pytorch_model.safetensors (or a pipeline with vae/)"


def codec_root(path: str, revision: str | None = None) -> Root:
    """The root that holds `config.json` of a codec; a pipeline directory leads to its `vae/`.

    A hub id is downloaded (or found in the hub cache) at its revision. Raises InputError for a missing
    directory, an unpinned or unreachable hub id, or a directory without config.json.
    """
    root = _root(path, revision)
    for candidate in (root, root.child("vae")):
        if candidate.exists("config.json"):
            return candidate
    raise InputError(
        "The codec directory holds no config.json",
        key="codec.path",
        value=path,
        rule=_LAYOUT,
        next_step="name a directory written by diffusers' save_pretrained or by jobs.fit_codec",
    )


def _root(path: str, revision: str | None) -> Root:
    if "://" in path:
        return Root(path)
    local = Path(path).expanduser()
    if local.is_dir():
        return Root(str(local))
    if local.exists():
        raise InputError("The codec path is a file", key="codec.path", value=path, rule=_LAYOUT)
    if revision is not None and _HUB_ID.fullmatch(path):
        return Root(str(_hub_snapshot(path, revision)))
    raise InputError(
        "There is no such codec directory",
        key="codec.path",
        value=path,
        rule=_LAYOUT,
        next_step="correct the path; to take it from the hub, pin it with codec.revision=<commit or tag>",
    )


def _hub_snapshot(repo: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_HUB_FILES, *(f"vae/{name}" for name in _HUB_FILES)]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"The hub does not give this codec: {type(error).__name__}: {str(error).splitlines()[0]}",
            key="codec.path",
            value=f"{repo} at revision {revision}",
            rule="a hub id must exist at its revision and be reachable or cached",
            next_step="check id, revision, network and HF_TOKEN, or download it and give the directory",
        ) from error


def local_directory(root: Root) -> Path:
    """`root` as a directory on local disk; a remote one is copied once per content into the cache.

    The cache key covers name, size, etag and time of every object, so a changed codec is copied again. The
    copy appears by one rename of a finished directory: two processes that copy at once do no harm.
    """
    here = root.local_path()
    if here is not None:
        return here
    objects = [o for o in root.list() if "/" not in o.key]
    stamp = "\n".join(f"{o.key} {o.size_bytes} {o.etag} {o.mtime_ns}" for o in objects)
    name = hashlib.blake2b(f"{root.uri}\n{stamp}".encode(), digest_size=16).hexdigest()
    cache = _cache_directory()
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=cache))
    try:
        for o in objects:
            if o.key == "config.json" or ".safetensors" in o.key:
                _copy(root, o.key, partial / o.key)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process finished the same copy first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _copy(root: Root, key: str, target: Path) -> None:
    with root.open(key) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 8 << 20)


def _cache_directory() -> Path:
    base = os.environ.get("LATENTLOOM_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "latentloom") / "codecs"
