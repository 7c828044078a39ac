"""Renders the kustomizations under infra/ where neither kubectl nor kustomize is installed.

It knows exactly the features used there (resources, components, namespace, images with the places that
`configurations` adds, JSON6902 patches given inline) and refuses any other, so that it cannot pass over something
silently. Where the real program is installed, a test compares.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

_KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "images", "configurations", "patches"}
_CLUSTER_SCOPED = {
    "Namespace",
    "ClusterRole",
    "ClusterRoleBinding",
    "PersistentVolume",
    "PriorityClass",
    "StorageClass",
    "ResourceFlavor",
    "ClusterQueue",
}


def render_here(folder: Path) -> list[dict[str, Any]]:
    """Every object of the kustomization in `folder`, in no particular order."""
    return _build(folder, [])


def _build(folder: Path, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a component, too, which changes and adds to what was there before it."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(wanted) - _KEYS
    if unknown:
        raise NotImplementedError(f"{folder}: {sorted(unknown)} are not among {sorted(_KEYS)}")
    manifests = list(before)
    for name in wanted.get("resources", []):
        path = folder / name
        more = render_here(path) if path.is_dir() else [m for m in yaml.safe_load_all(path.read_text()) if m]
        # Anchors make parts of a document one object: a patch of one must not change the others.
        manifests += [_unshared(m) for m in more]
    for name in wanted.get("components", []):
        manifests = _build(folder / name, manifests)
    for patch in wanted.get("patches", []):
        _patch(manifests, patch)
    places = [p for name in wanted.get("configurations", []) for p in _image_places(folder / name)]
    for manifest in manifests:
        if "namespace" in wanted and manifest["kind"] not in _CLUSTER_SCOPED:
            manifest["metadata"]["namespace"] = wanted["namespace"]
        for image in wanted.get("images", []):
            _rename_images(manifest, image)
            for place in places:
                if manifest["kind"] == place["kind"]:
                    _rename_at(manifest, place["path"].split("/"), image)
    return manifests


def _unshared(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _unshared(v) for k, v in node.items()}
    return [_unshared(v) for v in node] if isinstance(node, list) else node


def _patch(manifests: list[dict[str, Any]], patch: dict[str, Any]) -> None:
    unknown = set(patch) - {"target", "patch", "options"} | set(patch["target"]) - {"kind", "name"}
    if unknown:
        raise NotImplementedError(f"patches: {sorted(unknown)}")
    operations = yaml.safe_load(patch["patch"])
    if not isinstance(operations, list):
        raise NotImplementedError("only JSON6902 patches")
    target = patch["target"]
    hit = False
    for manifest in manifests:
        name, kind = manifest["metadata"]["name"], manifest["kind"]
        if kind == target["kind"] and re.fullmatch(target.get("name", ".*"), name):
            hit = True
            for operation in operations:
                apply_operation(manifest, operation)
    if not hit:
        raise ValueError(f"no object is the target {target}")


def apply_operation(document: dict[str, Any], operation: dict[str, Any]) -> None:
    """One operation of RFC 6902 on a document, in place: add, remove, replace, move or copy."""
    if operation["op"] == "move":
        value = _take(document, operation["from"])
        apply_operation(document, {"op": "add", "path": operation["path"], "value": value})
    elif operation["op"] == "copy":
        parent, key = _parent(document, operation["from"])
        value = parent[int(key) if isinstance(parent, list) else key]
        apply_operation(document, {"op": "add", "path": operation["path"], "value": value})
    elif operation["op"] == "remove":
        _take(document, operation["path"])
    elif operation["op"] in ("add", "replace"):
        parent, key = _parent(document, operation["path"])
        value = copy.deepcopy(operation["value"])
        if isinstance(parent, list) and operation["op"] == "add":
            parent.insert(len(parent) if key == "-" else int(key), value)
        else:
            index: Any = int(key) if isinstance(parent, list) else key
            if operation["op"] == "replace":
                _ = parent[index]  # RFC 6902: what is replaced must exist
            parent[index] = value
    else:
        raise NotImplementedError(operation["op"])


def _take(document: dict[str, Any], path: str) -> Any:
    parent, key = _parent(document, path)
    return parent.pop(int(key) if isinstance(parent, list) else key)


def _parent(document: Any, path: str) -> tuple[Any, str]:
    *steps, last = [s.replace("~1", "/").replace("~0", "~") for s in path.removeprefix("/").split("/")]
    for step in steps:
        document = document[int(step)] if isinstance(document, list) else document[step]
    return document, last


def _image_places(path: Path) -> list[dict[str, str]]:
    """Where else an image may stand, by the kind of object."""
    wanted = yaml.safe_load(path.read_text())
    if set(wanted) != {"images"} or any(set(place) != {"kind", "path"} for place in wanted["images"]):
        raise NotImplementedError(f"{path}: only places of images, by kind and path")
    places: list[dict[str, str]] = wanted["images"]
    return places


def _rename_images(node: Any, wanted: dict[str, str]) -> None:
    if isinstance(node, list):
        for each in node:
            _rename_images(each, wanted)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                for container in value:
                    container["image"] = _renamed(container["image"], wanted)
            else:
                _rename_images(value, wanted)


def _rename_at(node: Any, steps: list[str], wanted: dict[str, str]) -> None:
    step, *rest = steps
    if step.removesuffix("[]") not in node:
        return
    if not rest:
        node[step] = _renamed(node[step], wanted)
    else:
        inner = node[step.removesuffix("[]")]
        for each in inner if step.endswith("[]") else [inner]:
            _rename_at(each, rest, wanted)


def _renamed(image: str, wanted: dict[str, str]) -> str:
    name, _, tag = image.partition(":")
    if name != wanted["name"]:
        return image
    tail = f"@{wanted['digest']}" if "digest" in wanted else f":{wanted.get('newTag', tag)}"
    return wanted.get("newName", name) + tail
