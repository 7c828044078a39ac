"""From `codec.path` to the files of a codec: a local directory, an fsspec URI, or a hub id at a revision."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.storage.trust import HUB_ID, hub_snapshot, tensor_head

# A hub's patterns match a path as a whole, and * whatever folders there are: each begins with a name.
_HUB_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model*.safetensors.index.json",
)
_HUB_LEFT = ("*.fp16.*", "*.non_ema.*")
_LAYOUT = "a codec is a directory with config.json and diffusion_pytorch_model.safetensors (or a pipeline with vae/)"


def codec_root(path: str, revision: str | None = None) -> Root:
    """The root that holds `config.json` of a codec; a pipeline directory leads to its `vae/`.

    A hub id is downloaded (or found in the hub cache) at its revision. Raises InputError for a missing
    directory, an unpinned or unreachable hub id, or a directory without config.json.
    """
    if "://" in path:
        root = Root(path)
    elif (local := Path(path).expanduser()).is_dir():
        root = Root(str(local))
    elif local.exists():
        raise InputError("The codec path is a file", key="path", value=path, rule=_LAYOUT)
    elif revision is not None and HUB_ID.fullmatch(path):
        patterns = [*_HUB_FILES, *(f"vae/{name}" for name in _HUB_FILES)]
        root = Root(str(hub_snapshot(path, revision, patterns, what="this codec", key="path", ignore=_HUB_LEFT)))
    else:
        raise InputError(
            "There is no such codec directory",
            key="path",
            value=path,
            rule=_LAYOUT,
            next_step="correct the path; to take it from the hub, pin it with revision=<commit or tag>; "
            "without any, fit a small one: python -m jobs.fit_codec source.uri=IMAGES output.uri=CODEC",
        )
    for candidate in (root, root.child("vae")):
        if candidate.exists("config.json"):
            return candidate
    raise InputError(
        "The codec directory holds no config.json",
        key="path",
        value=path,
        rule=_LAYOUT,
        next_step="name a directory written by diffusers' save_pretrained or by jobs.fit_codec",
    )


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
    base = os.environ.get("LATENTLOOM_CACHE")
    cache = (Path(base) if base else Path.home() / ".cache" / "latentloom") / "codecs"
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=cache))
    try:
        for key in (o.key for o in objects if o.key == "config.json" or ".safetensors" in o.key):
            with root.open(key) as source, (partial / key).open("wb") as sink:
                shutil.copyfileobj(source, sink, 8 << 20)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process finished the same copy first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


# -- Weight files of a codec: which they are, their hashes. Safetensors only, no torch --------------------


WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file with its size and hash."""

    name: str
    size_bytes: int
    sha256: str


def weight_files(root: Root, path: str) -> list[WeightFile]:
    """The weight files at `root`, checked for completeness and hashed; InputError says what is wrong."""
    files = []
    for name in _names(root, path):
        size = root.info(name).size_bytes
        tensor_head(root, name, path)
        digest = hashlib.sha256()
        with root.open(name) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
        files.append(WeightFile(name, size, digest.hexdigest()))
    return files


def codec_files(root: Root, path: str) -> list[str]:
    """The names of all files that make a codec; InputError says which is missing, pickled or one too many."""
    return ["config.json", *([] if root.exists(WEIGHTS) else [INDEX]), *_names(root, path)]


def _names(root: Root, path: str) -> list[str]:
    single, sharded = root.exists(WEIGHTS), root.exists(INDEX)
    if single and sharded:
        raise InputError(
            f"The codec's weights are there twice: {WEIGHTS} and {INDEX}",
            key="path",
            value=path,
            rule="one of them is loaded, and a reader cannot know which its maker means",
            next_step="remove the one that is not to be used",
        )
    if single:
        return [WEIGHTS]
    if not sharded:
        files = sorted(o.key for o in root.list() if "/" not in o.key)
        if any(name.endswith(_PICKLE) for name in files):
            raise InputError(
                "The codec's weights are pickled, and unpickling runs code from the file",
                key="path",
                value=path,
                rule=f"weights are read from {WEIGHTS} only",
                next_step="where you trust the file, convert it once: AutoencoderKL.from_pretrained(path)"
                ".save_pretrained(new_path), then name new_path",
            )
        raise InputError(
            f"The codec directory is incomplete: it holds {', '.join(files)} and no weights",
            key="path",
            value=path,
            rule=f"weights are read from {WEIGHTS}",
            next_step="copy the missing file, or rename the variant to be used",
        )
    # The shards of the index.
    try:
        names = sorted(set(json.loads(root.read_bytes(INDEX))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"The index {INDEX} cannot be read: {error!r}", key="path", value=path) from error
    # A name with a slash would lead out of the directory.
    missing = [n for n in names if "/" in n or "\\" in n or not n.endswith(".safetensors") or not root.exists(n)]
    if missing or not names:
        raise InputError(
            f"The index {INDEX} names files that are not there: {', '.join(missing) or 'none at all'}",
            key="path",
            value=path,
            next_step="copy the missing files",
        )
    return names
