"""The read side of training checkpoints: which are complete, and are their files what was saved. No torch.

A checkpoint is the directory <generation>-<attempt>-<images>-<token> of safetensors shards, complete once
COMPLETE.json names them with size and sha256 (earlier releases wrote <images>-<token>). The newest is the last one of
the newest start, whatever earlier starts reached. Names of other files are refused, so nothing read here can be
anything but tensors.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import StringConstraints, TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.storage.stored import OBJECT, OPEN, Count, parse

MARKER = "COMPLETE.json"
NAME = re.compile(r"^(?:(\d{6})-(\d{6})-)?(\d{15})-([0-9a-f]{8})$")
_Shard = Annotated[str, StringConstraints(pattern=r"^shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")]
_log = logging.getLogger(__name__)


@with_config(OPEN)
class _Track(TypedDict):
    name: str
    sigma_rel: float | None


@with_config(OPEN)
class _Meta(TypedDict):
    """A training state. Who resumes from it asks for all of it; `model` and `inputs` are checked by their readers."""

    images: Count
    format_version: NotRequired[int]
    step: NotRequired[Count]
    seed: NotRequired[int]
    skipped_steps: NotRequired[Count]
    skipped_in_a_row: NotRequired[Count]
    rollbacks: NotRequired[Count]
    window: NotRequired[dict[str, list[float]]]
    identity: NotRequired[dict[str, Any]]
    model: NotRequired[dict[str, Any] | None]
    ema_tracks: NotRequired[list[_Track]]


@with_config(OPEN)
class _File(TypedDict):
    bytes: Count
    sha256: str


@with_config(OPEN)
class _Marker(TypedDict):
    meta: _Meta
    files: dict[_Shard, _File]
    resumed: NotRequired[Count | None]
    history_records: NotRequired[Count]


_MARKER = TypeAdapter(_Marker)


@dataclass(frozen=True)
class Complete:
    """A checkpoint whose marker exists: directory name, images seen, the marker's content."""

    name: str
    images: int
    marker: Mapping[str, Any]

    @property
    def start(self) -> tuple[int, int]:
        """Generation and attempt of the start that wrote it; (0, 0) for one of an earlier release."""
        place = place_in_run(self.name)
        return place[:2] if place is not None else (0, 0)

    @property
    def resumed(self) -> int:
        """At how many images the start that wrote it began."""
        images = self.marker.get("resumed")
        return self.images if images is None else int(images)

    @property
    def meta(self) -> Mapping[str, Any]:
        """The JSON part of the training state."""
        value: Mapping[str, Any] = self.marker["meta"]
        return value

    @property
    def power_tracks(self) -> list[tuple[str, float]]:
        """Name and sigma_rel of the power-function averages it holds."""
        tracks = self.meta.get("ema_tracks", ())
        return [(track["name"], float(track["sigma_rel"])) for track in tracks if track["sigma_rel"] is not None]


def place_in_run(name: str) -> tuple[int, int, int] | None:
    """(generation, attempt, images) of a checkpoint's directory, which orders them; None for another directory."""
    match = NAME.match(name)
    return None if match is None else (int(match.group(1) or 0), int(match.group(2) or 0), int(match.group(3)))


def list_complete(root: Root) -> list[Complete]:
    """Checkpoints with a readable marker, oldest first; a torn marker is warned about and left out."""
    complete = []
    places = [(place, name) for name in root.list_dirs() if (place := place_in_run(name)) is not None]
    for place, name in sorted(places):
        try:
            data = root.read_bytes(f"{name}/{MARKER}")
        except FileNotFoundError:
            continue  # still being written, or torn: no marker, no checkpoint
        try:
            if "removed" not in parse(OBJECT, data, f"{name}/{MARKER}"):  # before it was complete
                marker = parse(_MARKER, data, f"{name}/{MARKER}")
                complete.append(Complete(name, place[2], cast(Mapping[str, Any], marker)))
        except InputError as error:
            _log.warning("checkpoint %s is skipped: %s", root.uri_of(name), error.what)
    return complete


@dataclass(frozen=True)
class CheckpointPlace:
    """One complete checkpoint and the directory it lies in."""

    root: Root
    complete: Complete

    @property
    def uri(self) -> str:
        """The checkpoint's own URI."""
        return self.root.uri_of(self.complete.name)


def find_checkpoint(root: Root) -> CheckpointPlace | None:
    """The checkpoint at a URI, or the newest complete one right below it; None when there is neither."""
    parent, _, name = root.uri.rpartition("/")
    if NAME.match(name) and root.exists(MARKER):
        above = Root(parent)
        mine = [c for c in list_complete(above) if c.name == name]
        return CheckpointPlace(above, mine[0]) if mine else None
    complete = list_complete(root)
    return CheckpointPlace(root, complete[-1]) if complete else None


def fetch_checked(root: Root, name: str, files: Mapping[str, Any], scratch: Path) -> tuple[Path, str | None]:
    """A local directory with a checkpoint's files, fetched below `scratch` unless they are local; what is wrong."""
    local = local_copy(root, name, scratch)
    if local.is_relative_to(scratch):
        shutil.rmtree(local, ignore_errors=True)
        root.download_dir(name, local)
    present = {p.name for p in local.glob("*.safetensors")}
    if present != set(files):
        return local, f"files {sorted(present ^ set(files))} are missing or foreign"
    for file, expected in sorted(files.items()):
        with open(local / file, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if (local / file).stat().st_size != expected["bytes"] or sha256 != expected["sha256"]:
            return local, f"{file} does not have the recorded size and sha256"
    return local, None


def local_copy(root: Root, name: str, scratch: Path) -> Path:
    """Where a checkpoint's files are on this machine: in place, or below `scratch` once fetched."""
    in_place = root.local_path(name)
    return in_place if in_place is not None else scratch / name
