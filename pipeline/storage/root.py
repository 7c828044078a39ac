"""The one door to storage: whole-object puts, put-if-absent, ranged reads and sorted listings on any fsspec URI.

Nothing here renames, appends or rewrites in place. `put_if_absent` has exactly one winner:
local files by an exclusive hard link, S3 by `If-None-Match: *`, other stores by fsspec's "create" mode
(generation match on GCS). An object is visible whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from pipeline.errors import InputError
from pipeline.storage.errors import (
    already_exists,
    changed,
    describe,
    is_transient,
    not_implemented,
    note_answer,
    plain_error,
    storage_errors,
    without_user,
)
from pipeline.storage.stores import (
    BUFFER_BYTES,
    RangedFile,
    create_whole,
    half_written,
    is_marked,
    list_page,
    make_filesystem,
    put_whole,
    read_if_match,
    read_part,
    read_unchanged,
    read_whole,
    refuse_or_warn,
    scanned,
    single_writer,
    size_and_version,
    written_beside,
)

# -- What may be the name of an object below its root ----------------------------------------------------------


class KeyRefused(ValueError):
    """A name that cannot be a key."""


def check_key(key: str, *, remote: bool = False) -> str:
    """The key itself; KeyRefused when it is absolute, empty in a part, or climbs out of its root.

    remote: on an object store, where a//b is another object than a/b, a part within may be empty.
    """
    parts = key.split("/")
    refused = (".", "..") if remote and key and parts[-1] else ("", ".", "..")
    if key.startswith("/") or "\\" in key or "\0" in key or any(p in refused for p in parts):
        raise KeyRefused(f"storage key {key!r} must be relative, '/'-separated and without '.' or '..' parts")
    return key


T = TypeVar("T")

_ATTEMPTS, _BACKOFF_BASE_S, _BACKOFF_CAP_S = 8, 0.25, 15.0
CONTENT = "sha256:"  # what an etag begins with that is not the store's: the content was hashed when it was listed
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: key relative to its root, size in bytes, and what identifies its version."""

    key: str
    size_bytes: int
    etag: str | None
    mtime_ns: int | None


class Version(Protocol):
    """What identifies the version of an object: an `ObjectInfo`, or what somebody keeps of one."""

    @property
    def etag(self) -> str | None: ...
    @property
    def mtime_ns(self) -> int | None: ...


# One level of a directory, sorted: a name, of a directory with "/" at its end, and how to get the version of a key.
# A directory sorts as "name/": so the depth-first order is the order of the full keys.
Entries = Iterator[tuple[str, Callable[[str], ObjectInfo]]]
Lister = Callable[[str], Entries]  # of what lies directly below a directory, as `Root.entries`
Infos = Iterator[ObjectInfo]
# Names as in `Entries`, of objects with their version under that name; and how to ask for those that follow.
Page = tuple[list[tuple[str, ObjectInfo | None]], str | None]
Names = list[str]


class Root:
    """A place in storage, bound to one URI; every key is relative to it. Cheap to pickle and send to workers."""

    def __init__(self, uri: str) -> None:
        if not uri:
            raise InputError("An empty URI names no place in storage", rule="a URI is a path or scheme://...")
        scheme, separator, rest = uri.partition("://")
        if not separator:
            scheme, rest = "file", uri
        if scheme in ("file", "local"):
            self.uri, self._local = os.path.abspath(os.path.expanduser(rest)), True
        else:
            self.uri, self._local = f"{scheme}://{rest.rstrip('/')}", False
        self._scheme = scheme
        self._fs: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Root({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Root) and other.uri == self.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    # -- names ---------------------------------------------------------------------------------------------

    def child(self, sub: str) -> Root:
        """The root one or more levels down."""
        return Root(self.uri_of(sub))

    def uri_of(self, key: str) -> str:
        """The full URI of a key."""
        return f"{self.uri}/{check_key(key, remote=not self._local)}" if key else self.uri

    def local_path(self, key: str = "") -> Path | None:
        """The path on this machine's disk, or None for a remote store."""
        return Path(self.uri_of(key)) if self._local else None

    def _path(self, key: str) -> str:
        full = self.uri_of(key)
        return full if self._local else cast(str, self.fs._strip_protocol(full))

    @property
    def fs(self) -> Any:
        """The fsspec filesystem; made on first use in each process, without a listings cache."""
        if self._fs is None:
            self._fs = make_filesystem(self.uri, self._scheme)
        return self._fs

    # -- reading -------------------------------------------------------------------------------------------

    def read_bytes(self, key: str) -> bytes:
        """The whole object; FileNotFoundError when it is absent."""
        if self._local:
            return Path(self._path(key)).read_bytes()
        return self._retry(lambda: read_whole(self.fs, self._path(key)))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from offset `start` (fewer at the object's end)."""
        if self._local:
            with open(self._path(key), "rb") as file:
                file.seek(start)
                return file.read(length)
        return self._retry(lambda: read_part(self.fs, self._path(key), self.uri, start, length))

    def read_version(self, key: str, version: Version, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object as it was listed, all of them or a range; ObjectChanged when it is another one now.

        What comes was there under this etag (without one: with this time of change) while it was read. S3 is asked
        for it, as there an etag comes back with the content; on a disk the open file tells; elsewhere whoever looks
        before and after sees a change. Where nothing is known of the version, any will do.
        """
        etag = None if (version.etag or "").startswith(CONTENT) else version.etag  # no store knows it
        if version.mtime_ns is None and (self._local or etag is None):
            return self.read_bytes(key) if length is None else self.read_range(key, start, length)
        data = None
        if self._local:
            data = read_unchanged(self._path(key), version.mtime_ns, start, length)
        elif etag is None or (data := self._read_if_match(key, etag, start, length)) is None:
            before = self.info(key)
            data = self.read_bytes(key) if length is None else self.read_range(key, start, length)
            same = before.etag == etag if etag is not None else before.mtime_ns == version.mtime_ns
            data = data if same and self.info(key) == before else None
        if data is None:
            raise changed(self.uri_of(key))
        return data

    def _read_if_match(self, key: str, etag: str, start: int, length: int | None) -> bytes | None:
        def read() -> bytes | None:
            try:
                return read_if_match(self.fs, self._path(key), etag, start, length)
            except Exception as error:
                if already_exists(error):  # the same status, 412
                    raise changed(self.uri_of(key)) from None
                raise

        return self._retry(read)

    def open(self, key: str) -> io.BufferedReader:
        """A seekable binary file for reading; on a remote store every read of its buffer is retried by itself."""
        if self._local:
            return open(self._path(key), "rb")
        return io.BufferedReader(self.ranged(key, self.info(key).size_bytes), BUFFER_BYTES)

    def ranged(self, key: str, size_bytes: int) -> RangedFile:
        """A seekable file of known size of which every read is one request for just these bytes."""
        return RangedFile(lambda start, length: self.read_range(key, start, length), size_bytes)

    def exists(self, key: str) -> bool:
        """Whether an object of this key exists now."""
        with contextlib.suppress(FileNotFoundError):
            self.info(key)
            return True
        return False

    def info(self, key: str) -> ObjectInfo:
        """Size and version of an object; FileNotFoundError when it is absent or a directory."""
        if self._local:
            info = _local_info(self._path(key), key)
            if not os.path.isfile(self._path(key)):
                raise FileNotFoundError(self.uri_of(key))
            return info
        detail = self._retry(lambda: self.fs.info(self._path(key)))
        if detail["type"] == "directory":
            raise FileNotFoundError(self.uri_of(key))
        return _object_info(detail, key)

    def kind(self) -> str:
        """What lies at the root's own URI: "missing", "file" or "directory"."""
        if self._local:
            return "directory" if os.path.isdir(self.uri) else "file" if os.path.exists(self.uri) else "missing"
        try:
            detail = self._retry(lambda: self.fs.info(self._path("")))
        except FileNotFoundError:
            return "missing"
        except PermissionError:
            # The refusal of a question about one object has no body that says why; that of a listing has.
            self._retry(lambda: self.fs.ls(self._path(""), detail=True))
            raise
        return "directory" if detail["type"] == "directory" else "file"

    def list(self, prefix: str = "", *, dangling: bool = False, entries: Lister | None = None) -> Infos:
        """Every object below a directory, recursively, ordered by key; nothing when it does not exist.

        Memory is that of the largest directory. Half-written files are no objects, nor are links to nowhere, but with
        `dangling`, where they have no size or version. entries: what lists a directory, instead of this root's own.
        """
        for name, version_of in (entries or self.entries)(prefix):
            key = f"{prefix}/{name}" if prefix else name
            if name == "/":
                yield from self._below_empty(prefix)
                continue
            if name.endswith("/"):
                yield from self.list(key[:-1], dangling=dangling, entries=entries)
                continue
            try:
                info = version_of(key)
            except OSError as error:
                if not isinstance(error, FileNotFoundError) and error.errno != errno.ELOOP:
                    raise
                if dangling and self._local and os.path.islink(self._path(key)):
                    yield ObjectInfo(key, 0, None, None)
                continue
            yield info

    def _below_empty(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose keys go on with // after a prefix: no directory of a name holds them."""
        base = self._path(prefix).rstrip("/")
        found = self._retry(lambda: self.fs.find(base, detail=True))
        for name in sorted(n for n in found if n.startswith(f"{base}//")):
            if not name.endswith("/"):
                yield _object_info(found[name], f"{prefix}/{name[len(base) + 1 :]}")

    def half_written(self, prefix: str) -> Iterator[ObjectInfo]:
        """What writers that died left right below a local directory: files of no name, which are no objects."""
        for name, stat in half_written(self._path(prefix)) if self._local else ():
            yield ObjectInfo(f"{prefix}/{name}", stat.st_size, None, stat.st_mtime_ns)

    def list_dirs(self, prefix: str = "") -> Names:
        """The names of the directories directly below a directory, sorted."""
        return [name[:-1] for name, _ in self.entries(prefix) if name.endswith("/")]

    def entries(self, prefix: str) -> Entries:
        """What lies directly below a directory, sorted; nothing when it does not exist."""
        if not self._local:
            return self._remote_entries(prefix)
        # Of a directory with millions of files only the names are held; each is asked for its size in its turn.
        directory = self._path(prefix)
        return ((name, functools.partial(_local_info, os.path.join(directory, name))) for name in scanned(directory))

    def _remote_entries(self, prefix: str) -> Entries:
        base = self._path(prefix).rstrip("/")
        try:
            details = self._retry(lambda: self.fs.ls(base, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return
        entries = []
        for detail in details:
            name = detail["name"].rstrip("/")[len(base) :].lstrip("/")
            if not name and detail["type"] == "directory":
                entries.append((self._empty_part(prefix), detail))
            elif name and "/" not in name:
                entries.append((name + "/" if detail["type"] == "directory" else name, detail))
        for name, detail in sorted(entries, key=itemgetter(0)):
            yield name, functools.partial(_object_info, detail)

    def _empty_part(self, prefix: str) -> str:
        """The name of a directory without one: of keys with an empty part, as in a//b."""
        if not prefix:
            raise KeyRefused(f"below {self.uri} are keys that begin with /")
        return "/"

    def page(
        self, prefix: str, begins: str = "", *, after: str = "", token: str | None = None, most: int = 1000
    ) -> Page | None:
        """At most so many of `entries`: names that begin so and come after one; None of a store that cannot tell."""
        path = self._path(prefix)
        answer = None if self._local else self._retry(lambda: list_page(self.fs, path, begins, after, token, most))
        if answer is None:
            return None
        infos = [(name, None if detail is None else _object_info(detail, name)) for name, detail in answer[0]]
        return [(self._empty_part(prefix) if name == "/" else name, info) for name, info in infos], answer[1]

    # -- writing -------------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes) -> None:
        """Write a whole object, replacing any other: readers see the old bytes or the new, never a mixture."""
        if self._local:
            with written_beside(self._path(key), data) as temporary:
                os.replace(temporary, self._path(key))
            return
        self._retry(lambda: put_whole(self.fs, self._path(key), data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create an object: True when this call created it, False when one was there already.

        An answer that got lost (the connection broke after the store had taken the object) is resolved by looking
        whose object it is: by a mark in its metadata on S3 and GCS, whose clients may repeat a call unasked; on a
        disk, where NFS may, by the second name of our file; elsewhere the same bytes after a broken attempt are ours.
        """
        if self._local:
            with written_beside(self._path(key), data) as temporary:
                try:
                    os.link(temporary, self._path(key))
                except FileExistsError:
                    return os.stat(temporary).st_nlink > 1
            return True
        if single_writer() and self.exists(key):
            return False
        mark, tries = secrets.token_hex(8), 0

        def create() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._create_remote(key, data, mark)
            except Exception as error:
                if single_writer() and not_implemented(error):
                    put_whole(self.fs, self._path(key), data)
                    return True
                if not already_exists(error):
                    raise
                # Its answer may have got lost: then the object carries this call's mark, or its content.
                marked = self._retry(lambda: is_marked(self.fs, self._path(key), mark))
                return marked if marked is not None else tries > 1 and self.read_bytes(key) == data
            return True

        return self._retry(create)

    def _create_remote(self, key: str, data: bytes, mark: str) -> None:
        create_whole(self.fs, self._path(key), data, mark)

    def delete(self, key: str) -> None:
        """Remove one object; nothing happens when it is absent. Only garbage collection calls this."""
        with contextlib.suppress(FileNotFoundError):
            if self._local:
                os.unlink(self._path(key))
            else:
                self._retry(lambda: self.fs.rm_file(self._path(key)))

    def upload_dir(self, local: Path, prefix: str = "") -> None:
        """Put every file of a local directory, in sorted order."""
        for path in sorted(p for p in Path(local).rglob("*") if p.is_file()):
            relative = path.relative_to(local).as_posix()
            self.put(f"{prefix}/{relative}" if prefix else relative, path.read_bytes())

    def download_dir(self, prefix: str, local: Path) -> None:
        """Copy every object below a prefix into a local directory, streaming."""
        for info in self.list(prefix):
            relative = info.key[len(prefix) :].lstrip("/")
            target = Path(local, *check_key(relative).split("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.open(info.key) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 8 << 20)

    # -- trouble -------------------------------------------------------------------------------------------

    def _retry(self, call: Callable[[], T]) -> T:
        """Run a remote call, again after transient errors: exponential backoff with full jitter.

        What comes out in the end is an OSError whose text says it all: StoreUnavailable when time might have helped.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer = call()
                note_answer(self.uri)
                return answer
            except Exception as error:
                if not is_transient(error):
                    note_answer(self.uri)
                if attempt == _ATTEMPTS or not is_transient(error):
                    plain = plain_error(error, self.uri)
                    if plain is error:
                        raise
                    raise plain from error
                if attempt == 2:
                    _log.warning("the store does not serve us, trying again for a while: %s", describe(error))
                time.sleep(random.uniform(0, min(_BACKOFF_CAP_S, _BACKOFF_BASE_S * 2**attempt)))
        raise AssertionError("unreachable")

    def probe(self) -> None:
        """Refuse a store that cannot be written or cannot create-if-absent; leaves nothing where it may delete.

        Raises InputError, with the store's own words, when the output cannot be used. Where a single writer is
        vouched for, a store without conditional writes is only warned about.
        """
        key = f".probe/{secrets.token_hex(8)}"
        is_new = self._local and self.kind() == "missing"
        try:
            if self._local and self.kind() == "file":
                raise NotADirectoryError(f"{self.uri} is a file")
            atomic = self._creates_once(key)
        except storage_errors() as error:
            raise InputError(
                f"The output {without_user(self.uri)} cannot be written: {describe(error)}",
                rule="an output is a directory or bucket prefix this process may write to",
                next_step="check the URI, the endpoint, the permissions and the free space",
            ).but(key="output.uri", value=without_user(self.uri)) from None
        with contextlib.suppress(*storage_errors()):
            self.delete(key)
            if self._local:
                os.rmdir(os.path.dirname(self._path(key)))
            if is_new:  # a job that is refused later leaves nothing
                os.rmdir(self.uri)
        if not atomic:
            refuse_or_warn(self.uri)

    def _creates_once(self, key: str) -> bool:
        if self._local:
            return self.put_if_absent(key, b"probe") and not self.put_if_absent(key, b"again")
        try:
            for _ in ("first", "second"):
                self._retry(lambda: self._create_remote(key, b"probe", "probe"))
        except storage_errors() as error:
            if not_implemented(error):
                return False
            if already_exists(error):
                return True
            raise
        return False


def _local_info(path: str, key: str) -> ObjectInfo:
    stat = os.stat(path)
    return ObjectInfo(key, stat.st_size, None, stat.st_mtime_ns)


def _object_info(detail: dict[str, Any], key: str) -> ObjectInfo:
    return ObjectInfo(key, *size_and_version(detail))


def place_of(uri: str) -> tuple[Root, str]:
    """(the root an object lies in, its key there); a bare name lies in the working directory, "/name" in "/"."""
    folder, slash, name = uri.rpartition("/")
    if folder.endswith((":/", "://")):
        folder += "/"  # "memory://name", "file:///name": these slashes belong to the scheme and the root
    return Root(folder or slash or "."), name
