"""One object by its path or URI, as a root and a key."""

from __future__ import annotations

from pipeline.storage.root import Root


def place_of(uri: str) -> tuple[Root, str]:
    """(the root an object lies in, its key there); a bare name lies in the working directory, "/name" in "/"."""
    folder, slash, name = uri.rpartition("/")
    if folder.endswith((":/", "://")):
        folder += "/"  # "memory://name", "file:///name": these slashes belong to the scheme and the root
    return Root(folder or slash or "."), name
