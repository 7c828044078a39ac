"""What may be the name of an object below its root."""

from __future__ import annotations


class KeyRefused(ValueError):
    """A name that cannot be a key."""


def check_key(key: str) -> str:
    """The key itself; KeyRefused when it is absolute, empty in a part, or climbs out of its root."""
    parts = key.split("/")
    if key.startswith("/") or "\\" in key or "\0" in key or any(p in ("", ".", "..") for p in parts):
        raise KeyRefused(f"storage key {key!r} must be relative, '/'-separated and without '.' or '..' parts")
    return key
