"""`dataset.json`: what a root holds and how its rows were made; created once, compared for ever.

A dataset of images without any row may be given another identity, under a claim: it lies beside that claim, and later
ones name it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import ConflictError, InputError
from pipeline.storage.errors import unreadable
from pipeline.storage.root import Root
from pipeline.storage.stored import OPEN, Count, parse
from pipeline.store.ledger import layout
from pipeline.store.ledger.generation import at_one_generation, identity_key

Kind = Literal["latents", "images", "text", "codec"]


@with_config(OPEN)
class _Format(TypedDict):
    format: Literal["latentloom"]
    format_version: int


@with_config(OPEN)
class _Codec(TypedDict, total=False):
    """What readers use of the codec of latents: see `CodecInfo`."""

    class_name: str
    weights_sha256: str | None
    latent_channels: Annotated[int, Field(ge=1, le=1 << 16)]
    factor: Annotated[int, Field(ge=1, le=1 << 16)]
    path: str | None
    revision: str | None
    kind: str


@with_config(OPEN)
class _About(TypedDict, total=False):
    codec: _Codec
    encoder: dict[str, Any]
    classes: list[str]


@with_config(OPEN)
class _Fingerprint(TypedDict, total=False):
    codec: dict[str, Any]
    codec_dtype: str
    latent_dtype: str
    posterior: str
    max_length: Count
    width: Count
    layer: str | list[int]
    pooled: str
    embedding_dtype: str
    encoder_dtype: str


@with_config(OPEN)
class _Body(_Format):
    kind: Kind
    fingerprint: _Fingerprint
    fingerprint_digest: str
    about: _About


_FORMAT, _BODY = TypeAdapter(_Format), TypeAdapter(_Body)


@dataclass(frozen=True)
class Identity:
    """Kind of rows, the fingerprint every row shares, and facts that describe but do not identify them."""

    kind: Kind
    fingerprint: dict[str, Any]
    about: dict[str, Any]

    @property
    def fingerprint_digest(self) -> str:
        """Hex blake2b-128 of the canonical fingerprint."""
        return fingerprint_digest(self.fingerprint)

    def to_bytes(self) -> bytes:
        """Readable JSON; the order of keys is part of no contract."""
        body = {
            "format": layout.FORMAT,
            "format_version": layout.FORMAT_VERSION,
            "kind": self.kind,
            "fingerprint_digest": self.fingerprint_digest,
            "fingerprint": self.fingerprint,
            "about": self.about,
        }
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode()


def fingerprint_digest(fingerprint: Mapping[str, Any]) -> str:
    """Hex blake2b-128 of a fingerprint's canonical JSON."""
    return hashlib.blake2b(layout.canonical_json(fingerprint), digest_size=16).hexdigest()


def read_identity(root: Root, key: str = "root") -> Identity:
    """The identity of an existing dataset; InputError, naming `key`, when there is none or it is not ours."""
    created = _read(root, layout.IDENTITY, key)
    if created.kind != "images":
        return created
    return at_one_generation(root, lambda number: identity_at(root, number, key))


def identity_at(root: Root, number: int, key: str = "root") -> Identity:
    """The identity that generation `number` sees: read after some records, the one they were committed under."""
    return _read(root, identity_key(root, number), key)


def _read(root: Root, name: str, key: str) -> Identity:
    try:
        data = root.read_bytes(name)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"There is no dataset at {root.uri}",
            key=key,
            value=root.uri,
            rule=f"a dataset root holds {layout.IDENTITY}",
            next_step="correct the URI, or run the job that writes this dataset first",
        ) from None
    version = parse(_FORMAT, data, root.uri_of(name), key=key)["format_version"]
    if version > layout.FORMAT_VERSION:
        raise InputError(
            f"The dataset at {root.uri} has format version {version}: see {name}",
            key=key,
            rule=f"this release reads versions up to {layout.FORMAT_VERSION}",
            next_step="upgrade latentloom",
        )
    body = parse(_BODY, data, root.uri_of(name), key=key)
    identity = Identity(body["kind"], dict(body["fingerprint"]), dict(body["about"]))
    try:
        digest = fingerprint_digest(identity.fingerprint)
    except ValueError:  # NaN, which no fingerprint holds
        digest = ""
    if body["fingerprint_digest"] != digest:
        raise unreadable(root.uri_of(name), "fingerprint: it has not the digest fingerprint_digest", key=key)
    return identity


def claim_identity(root: Root, identity: Identity) -> Identity:
    """Create the identity, or accept the one that is there; ConflictError with the differences otherwise."""
    if root.put_if_absent(layout.IDENTITY, identity.to_bytes()):
        return identity
    existing = read_identity(root)
    check_same(root, existing, identity)
    return existing


def check_same(root: Root, existing: Identity, wanted: Identity) -> None:
    """ConflictError, field by field, unless both kind and fingerprint agree."""
    if existing.kind != wanted.kind:
        raise ConflictError(
            f"{root.uri} holds {existing.kind}, and this job writes {wanted.kind}",
            key="root",
            value=root.uri,
            next_step="choose another place",
        )
    changes = list(differences(existing.fingerprint, wanted.fingerprint))
    if changes:
        shown = "\n".join(f"    {name}: {old} there, {new} here" for name, old, new in changes[:20])
        raise ConflictError(
            f"{root.uri} was made with another fingerprint; the differing fields are\n{shown}",
            key="root",
            value=root.uri,
            rule="what lies in one place shares one fingerprint",
            next_step="restore the named settings, or choose another place",
        )


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, old, new) for every leaf in which two fingerprints differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key, "absent"), new.get(key, "absent"), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, _short(old), _short(new)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."
