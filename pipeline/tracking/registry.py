"""MLflow's model registry: versions that trainings register, and aliases that people and jobs rely on.

A version belongs to the run that trained it and names the exported model by URI in the tag `latentloom.uri`: the
store keeps the model, the registry says which one is meant. `models:/NAME@ALIAS` is how others ask for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.tracking.store import URI_TAG, MlflowStore, StoreRefused, TrackingUnavailable
from pipeline.tracking.uris import check_readable, masked_uri

LATEST = "latest"
_REFERENCE = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>\d+|latest))")


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model: where the export is, which run made it, its aliases and tags."""

    name: str
    version: int
    uri: str
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


def resolve(reference: str, tracking_uri: str) -> ModelVersion:
    """The version that `models:/NAME@ALIAS`, `models:/NAME/3` or `models:/NAME@latest` means now; InputError."""
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise InputError(
            f"{reference!r} names no registered model",
            key="model.uri",
            value=reference,
            rule="models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME@latest",
            next_step="name an alias of the model, such as models:/NAME@production",
        )
    name, wanted = found["name"], found["alias"] or found["version"]
    with opened(tracking_uri) as registry:
        versions = registry.versions(name)
        if wanted == LATEST:
            chosen = versions[-1:]
        else:
            chosen = [v for v in versions if wanted in v.aliases or wanted == str(v.version)]
    if not chosen:
        known = sorted({alias for v in versions for alias in v.aliases} | {str(v.version) for v in versions})
        raise InputError(
            f"The registry has no {reference}",
            key="model.uri",
            value=reference,
            rule=f"known of {name}: {', '.join(known)}" if known else f"there is no registered model {name!r}",
            next_step=f"train with registry.name={name}, promote a version to this alias, or name another; the "
            f"registry asked is {masked_uri(tracking_uri)}",
        )
    return chosen[0]


class Registry:
    """The registry beside a tracking store."""

    def __init__(self, store: MlflowStore) -> None:
        self._client: Any = store.client

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a model, oldest first; none when nothing is registered under the name."""
        from mlflow.exceptions import MlflowException

        try:
            aliases: dict[int, list[str]] = {}
            for alias, version in self._client.get_registered_model(name).aliases.items():
                aliases.setdefault(int(version), []).append(alias)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise
        found, token = [], None
        while True:
            quoted = name.replace("'", "\\'")
            page = self._client.search_model_versions(f"name = '{quoted}'", page_token=token)
            found += page
            token = page.token
            if not token:
                break
        versions = [_version(each, tuple(sorted(aliases.get(int(each.version), ())))) for each in found]
        return sorted(versions, key=lambda v: v.version)

    def point(self, version: ModelVersion, alias: str, tags: dict[str, str]) -> None:
        """Make the alias mean this version, and note why; the alias moves last."""
        for key, value in tags.items():
            self._client.set_model_version_tag(version.name, str(version.version), key, value)
        self._client.set_registered_model_alias(version.name, alias, str(version.version))


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Registry]:
    """The registry of a tracking URI; InputError when it is not there or does not answer."""
    from mlflow.exceptions import MlflowException

    check_readable(uri)
    try:
        yield Registry(MlflowStore(uri))
    except (MlflowException, TrackingUnavailable, StoreRefused, OSError) as error:
        raise InputError(
            f"The model registry cannot be used: {masked_uri(' '.join(str(error).split())[:300])}",
            key="tracking.uri",
            value=masked_uri(uri),
            next_step="check that it runs and lets this user in, then try again",
        ) from None


def _version(found: Any, aliases: tuple[str, ...]) -> ModelVersion:
    tags = dict(found.tags)
    return ModelVersion(
        found.name, int(found.version), tags.get(URI_TAG, found.source), found.run_id or "", aliases, tags
    )
