"""Strict JSON schemas out of custom resource definitions: a field that the definition does not know is an error."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FILES = {
    "RayJob": "ray.io_rayjobs.yaml",
    "RayCronJob": "ray.io_raycronjobs.yaml",
    "RayCluster": "ray.io_rayclusters.yaml",
}
VERSION = "v1"


def problems(manifest: dict[str, Any], folder: Path) -> list[str]:
    """What is wrong with a custom resource, by the definitions in `folder`; rules written in CEL are not run."""
    validator = _validator(folder / FILES[manifest["kind"]], manifest["apiVersion"])
    found = sorted(validator.iter_errors(manifest), key=lambda e: list(map(str, e.absolute_path)))
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in found]


@lru_cache
def _validator(path: Path, api_version: str) -> Any:
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    group = definition["spec"]["group"]
    assert api_version == f"{group}/{VERSION}", f"{api_version} is not {group}/{VERSION}"
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == VERSION)
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(node: Any) -> Any:
    """The schema with every object closed that does not say otherwise, as the API server's strict mode reads it."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    out = {k: strict(v) for k, v in node.items() if k not in ("description", "default", "format", "properties")}
    if isinstance(node.get("properties"), dict):
        # A property may be called "properties", "default" or the like: there its name is no keyword.
        out["properties"] = {name: strict(value) for name, value in node["properties"].items()}
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    if node.get("nullable"):
        return {"anyOf": [out, {"type": "null"}]}
    return out
