"""A store in memory, behind fsspec, every request of which is a scheduling point; `Root` above it is the product's.

Listings come page by page, each page as of its own moment; an ETag is a hash of the content, so it comes back when
content does; a request may fail, lose its answer, or be repeated by the client below (as gcsfs does by itself).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import fsspec

from tests.sim.scheduler import Sim

PAGE = 3


@dataclass(frozen=True)
class Stored:
    """An object: its bytes, when they were put, at which tick, and by which actor."""

    data: bytes
    at_s: float
    tick: int
    by: str

    @property
    def etag(self) -> str:
        return hashlib.md5(self.data, usedforsecurity=False).hexdigest()


class Store:
    """The objects, by key, and all that was ever created: (tick, actor, key)."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.objects: dict[str, Stored] = {}
        self.created: list[tuple[int, str, str]] = []
        self.deleted: list[tuple[int, str, str]] = []

    def put(self, key: str, data: bytes) -> None:
        """Store an object, whatever was there."""
        by = self.sim.current.name if self.sim.current is not None else "test"
        self.objects[key] = Stored(data, self.sim.now, self.sim.tick, by)
        self.created.append((self.sim.tick, by, key))

    def delete(self, key: str) -> None:
        """Remove an object; FileNotFoundError when there is none."""
        by = self.sim.current.name if self.sim.current is not None else "test"
        if key not in self.objects:
            raise FileNotFoundError(key)
        del self.objects[key]
        self.deleted.append((self.sim.tick, by, key))


class _Active:
    store: Store | None = None


def activate(store: Store | None) -> None:
    """Make a store the one that sim:// means."""
    _Active.store = store


class SimFileSystem(fsspec.AbstractFileSystem):
    """fsspec's view of the active store."""

    protocol = "sim"
    cachable = False

    @property
    def _store(self) -> Store:
        assert _Active.store is not None, "no simulation is running"
        return _Active.store

    def _request(self, op: str, key: str, effect: Any, repeats: bool = False) -> Any:
        fault = self._store.sim.point(op, key)
        if fault == "fail":
            raise ConnectionError("the request did not arrive")
        found = effect()
        if fault == "lost":
            raise ConnectionError("the answer got lost")
        if fault == "twice" and repeats:
            return effect()
        return found

    def _get(self, key: str) -> Stored:
        try:
            return self._store.objects[key]
        except KeyError:
            raise FileNotFoundError(key) from None

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return bytes(self._request("read", path, lambda: self._get(path).data[start:end]))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        def create() -> None:
            if path in self._store.objects:
                raise FileExistsError(path)
            self._store.put(path, bytes(value))

        if mode == "create":
            self._request("create", path, create, repeats=True)
        else:
            self._request("put", path, lambda: self._store.put(path, bytes(value)), repeats=True)

    def rm_file(self, path: str) -> None:
        self._request("delete", path, lambda: self._store.delete(path))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            if path in self._store.objects:
                return self._detail(path, self._store.objects[path])
            if any(key.startswith(f"{path}/") for key in self._store.objects):
                return {"name": path, "type": "directory", "size": 0}
            raise FileNotFoundError(path)

        found: dict[str, Any] = self._request("stat", path, look)
        return found

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found, last = [], ""
        while True:
            page = self._request("list", path, lambda last=last: self._page(path, last))
            found += page
            if len(page) < PAGE:
                break
            last = page[-1]["sort"]
        if not found:
            raise FileNotFoundError(path)
        return found

    def _page(self, path: str, last: str) -> list[dict[str, Any]]:
        prefix = f"{path}/"
        seen: dict[str, dict[str, Any]] = {}
        for key in sorted(k for k in self._store.objects if k.startswith(prefix)):
            head, slash, _ = key[len(prefix) :].partition("/")
            if head + slash <= last:
                continue
            if slash:
                detail = {"name": prefix + head, "type": "directory", "size": 0}
            else:
                detail = self._detail(key, self._store.objects[key])
            seen.setdefault(head + slash, detail | {"sort": head + slash})
        return [seen[name] for name in sorted(seen)][:PAGE]

    def _detail(self, key: str, stored: Stored) -> dict[str, Any]:
        moment = datetime.fromtimestamp(stored.at_s, UTC)
        return {"name": key, "type": "file", "size": len(stored.data), "ETag": stored.etag, "LastModified": moment}


fsspec.register_implementation("sim", SimFileSystem, clobber=True)


def read_if_match(fs: SimFileSystem, path: str, etag: str, start: int, length: int | None) -> bytes:
    """S3's conditional read, for `pipeline.storage.stores.read_if_match`."""

    def read() -> bytes:
        stored = fs._get(path)
        if stored.etag != etag:
            raise FileExistsError(path)  # as status 412 is known by
        return stored.data[start : None if length is None else start + length]

    return bytes(fs._request("read", path, read))
