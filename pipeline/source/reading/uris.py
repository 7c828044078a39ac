"""Images that a table only points to: URIs out of data are followed only where the configuration allows it."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.source.reading.remote import Failure, fetch
from pipeline.source.reasons import Reason
from pipeline.storage.root import Root, check_key


class UriReader:
    """Reads relative URIs below the source and absolute ones below the allowed prefixes, nothing else."""

    def __init__(self, root: Root, prefixes: Sequence[str], max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._roots = {prefix.rstrip("/") + "/": Root(prefix) for prefix in prefixes}

    def read(self, uri: str) -> bytes | Failure:
        """The object's bytes, or why they were not read."""
        place = self._place(uri)
        if place is None:
            rule = "URIs lie below the source (relative) or below source.uri_prefixes (absolute)"
            return Failure(Reason.URI_REFUSED, f"{uri[:200]}: {rule}")
        return fetch(*place, self._max_bytes)

    def _place(self, uri: str) -> tuple[Root, str] | None:
        for prefix, root in self._roots.items():
            if uri.startswith(prefix):
                return self._checked(root, uri[len(prefix) :])
        absolute = uri.startswith(("/", "~")) or "://" in uri
        return None if absolute else self._checked(self._root, uri)

    @staticmethod
    def _checked(root: Root, key: str) -> tuple[Root, str] | None:
        try:
            return root, check_key(key)
        except ValueError:
            return None
