"""The two kinds of stores: a disk, and what fsspec opens, with limits of time and one layer of retries, not three.

The S3 clients below fsspec repeat failed calls by themselves, nested in each other, which makes a store that stalls
hold a job for hours and hides whether it was the first or a later attempt that created an object. Both are turned
off here; `Root` repeats.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from pipeline.errors import InputError
from pipeline.storage.errors import without_user

# -- A local disk: files appear whole, under their name, or not at all -----------------------------------------


TEMPORARY_PREFIX = ".tmp-"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def written_beside(final: str, data: bytes) -> Iterator[str]:
    """A fully written, synced temporary file beside its final name; removed whatever happens.

    The block links or renames it to its name; the directory is synced after that.
    """
    directory = os.path.dirname(final)
    _make_synced(directory)
    temporary = os.path.join(directory, TEMPORARY_PREFIX + secrets.token_hex(8))
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        _sync(directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _make_synced(directory: str) -> None:
    """Make a directory and those above it that are missing, each durable in the one that holds it."""
    if os.path.isdir(directory):
        return
    above = os.path.dirname(directory)
    if above != directory:
        _make_synced(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
    _sync(above)


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_unchanged(path: str, mtime_ns: int | None, start: int, length: int | None) -> bytes | None:
    """Bytes of a file as it was at a time of change; None when it is another one, or changes meanwhile."""
    with open(path, "rb") as file:
        before = os.fstat(file.fileno()).st_mtime_ns
        file.seek(start)
        data = file.read() if length is None else file.read(length)
        return data if before == os.fstat(file.fileno()).st_mtime_ns == mtime_ns else None


def half_written(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """(name, what the system tells of it) of the temporary files right in a directory; a live writer's are young."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as scan:
        for entry in scan:
            if entry.name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False)


def scanned(directory: str) -> list[str]:
    """Sorted names of a directory's objects, links to nowhere among them, and, with "/" at the end, directories.

    None when it does not exist.
    """
    try:
        with os.scandir(directory) as scan:
            names, links = [], []
            for entry in scan:
                if entry.name.startswith(TEMPORARY_PREFIX):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name + "/")
                    continue
                try:
                    if entry.is_dir():
                        links.append(entry.name)
                    elif entry.is_file() or entry.is_symlink():
                        names.append(entry.name)
                except OSError as error:
                    if error.errno != errno.ELOOP:  # a link to itself leads nowhere, too
                        raise
                    names.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    if links:
        # Such a link could lead round in a circle; one to nowhere is no object.
        _log.warning(
            "links to directories are not followed: what lies behind %s%s in %s is not listed",
            min(links),
            f" and {len(links) - 1} more" if len(links) > 1 else "",
            directory,
        )
    return sorted(names)


# --------------------------------------------------------------------------------------------------------------
# Stores that cannot create an object only if it is absent: refused, unless a person vouches for a single
# writer.


VARIABLE = "LATENTLOOM_SINGLE_WRITER"
_WHAT = "has no atomic create-if-absent: two writes to one new key both succeeded, or it refuses such writes"


def single_writer() -> bool:
    """Whether a person vouches that only one job writes at a time; set for every process of the job."""
    return os.environ.get(VARIABLE, "") == "yes"


def refuse_or_warn(uri: str) -> None:
    """What happens to such a store: InputError, unless a single writer is vouched for, which is warned about."""
    if not single_writer():
        raise InputError(
            f"The store {without_user(uri)} {_WHAT}",
            rule="exactly-once commits need conditional writes",
            next_step="use a store with If-None-Match (S3, GCS, MinIO, Ceph) or a local file system; where no second "
            f"job ever writes to this output at the same time, {VARIABLE}=yes accepts it",
        )
    _log.warning(
        "WARNING: %s %s. %s is set: two jobs that write to this output at the same time WILL DAMAGE IT, and "
        "nothing will notice. See to it that there is only one.",
        without_user(uri),
        _WHAT,
        VARIABLE,
    )


S3 = ("s3", "s3a")
GCS = {"gs", "gcs"}
WEB = ("http", "https")
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 30.0
# A body that does not move at this rate, after the first half minute, is asked for or sent again.
SLOWEST_BYTES_PER_S = 256 << 10
LARGEST_PUT_BYTES = 5 << 30
_USUAL_BYTES = 64 << 20  # what a body of unknown size is taken to have at first
BUFFER_BYTES = 1 << 20
_MARK = "latentloom-writer"  # metadata of created objects


def process_settings() -> dict[str, str]:
    """Environment variables that every process of a job should have, the other users of a store's client included."""
    passed = {name: os.environ[name] for name in (VARIABLE,) if name in os.environ}
    if not any(os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")):
        return passed
    # Most stores besides AWS refuse the checksums that its newer clients add unasked.
    names = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
    return {**passed, **{name: os.environ.get(name, "when_required") for name in names}}


def make_filesystem(uri: str, scheme: str) -> Any:
    """The fsspec filesystem of a URI, without a listings cache and with one attempt per call.

    What is set by FSSPEC_S3 or fsspec's configuration files goes before these defaults. InputError when there is no
    backend for the scheme.
    """
    import fsspec
    from fsspec.config import conf

    try:
        if scheme in WEB:
            from pipeline.storage.web import client  # aiohttp is slow to import, and few need it

            return fsspec.core.url_to_fs(uri, get_client=client)[0]
        if scheme not in S3:
            return fsspec.core.url_to_fs(uri)[0]
        settings = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
        given = dict(conf.get("s3", {}).get("config_kwargs", {}))
        config = {**settings, "retries": {"total_max_attempts": 1, "mode": "standard"}, **given}
        fs = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=config)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"The store {without_user(uri)} cannot be used: {without_user(str(error))}",
            rule="the scheme needs an installed fsspec backend",
            next_step="pip install 'latentloom[s3]' ([gcs], [azure], another backend), or correct the scheme",
        ) from None
    fs.retries = 1
    return fs


def read_whole(fs: Any, path: str) -> bytes:
    """The bytes of an object, in one request where the store allows it."""
    # Without this S3 asks for the size first, which doubles the requests for small objects.
    one_stream = {"max_concurrency": 1} if "s3" in _protocols(fs) else {}

    def read(size_bytes: int) -> bytes:
        data: bytes = fs.cat_file(path, **one_stream, **_time_limit(fs, size_bytes))
        return data

    try:
        return read(_USUAL_BYTES)
    except TimeoutError:
        # Large, or slower than anybody should be: its size tells which.
        size_bytes = fs.info(path)["size"]
        if not size_bytes or size_bytes <= _USUAL_BYTES:
            raise
        return read(size_bytes)


def read_part(fs: Any, path: str, within: str, start: int, length: int) -> bytes:
    """`length` bytes of an object from an offset, fewer at its end. within: the root that no redirect may leave."""
    if set(WEB) & set(_protocols(fs)):
        from fsspec.asyn import sync

        from pipeline.storage.web import read

        data: bytes = sync(fs.loop, read, fs, path, within, start, length)
    else:
        # A hub's files read ahead by megabytes unless they are told not to.
        exactly = {"cache_type": "none"} if "hf" in _protocols(fs) else {}
        data = fs.cat_file(path, start=start, end=start + length, **exactly, **_time_limit(fs, length))
    return data


def read_if_match(fs: Any, path: str, etag: str, start: int, length: int | None) -> bytes | None:
    """Bytes of an object of one etag, else an answer of status 412; None where a store has no such request."""
    if "s3" not in _protocols(fs):
        return None
    from fsspec.asyn import sync

    bucket, _, key = path.partition("/")
    span = {} if length is None else {"Range": f"bytes={start}-{start + length - 1}"}

    async def get() -> bytes:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, IfMatch=f'"{etag}"', **span)
        async with answer["Body"] as body:
            data: bytes = await body.read()
            return data

    found: bytes = sync(fs.loop, get, **_time_limit(fs, _USUAL_BYTES if length is None else length))
    return found


def list_page(
    fs: Any, path: str, begins: str, after: str, token: str | None, most: int
) -> tuple[list[tuple[str, dict[str, Any] | None]], str | None] | None:
    """What lies directly below a directory, by one request: of at most so many names, sorted, what the store says (of
    directories, "name/", None), and the token for those that follow. None where a store has no such request.

    begins, after: of which names, and behind which one; token: of the page before.
    """
    if "s3" not in _protocols(fs) or fs.version_aware:
        return None
    bucket, _, key = path.rstrip("/").partition("/")
    base = f"{key}/" if key else ""
    where = {"ContinuationToken": token} if token else {"StartAfter": base + after} if after else {}
    span = {"Prefix": base + begins, "Delimiter": "/", "MaxKeys": most, **where}
    answer = fs.call_s3("list_objects_v2", Bucket=bucket, **span, **fs.req_kw)
    found = {detail["Key"][len(base) :]: {**detail, "size": detail["Size"]} for detail in answer.get("Contents", [])}
    found.pop("", None)  # the directory itself, as some clients mark it
    found |= {directory["Prefix"][len(base) :]: None for directory in answer.get("CommonPrefixes", [])}
    return sorted(found.items(), key=itemgetter(0)), answer.get("NextContinuationToken")


def size_and_version(detail: dict[str, Any]) -> tuple[int, str | None, int | None]:
    """Of what a store says of an object: its bytes, its etag, and when it changed, in nanoseconds."""
    etag = detail.get("ETag") or detail.get("etag") or detail.get("md5Hash") or detail.get("blob_id")
    modified: Any = detail.get("LastModified") or detail.get("mtime") or detail.get("created")
    stamp = modified.timestamp() if hasattr(modified, "timestamp") else modified
    mtime_ns = int(float(stamp) * 1e9) if stamp is not None else None
    return int(detail.get("size") or 0), str(etag).strip('"') if etag else None, mtime_ns


def put_whole(fs: Any, path: str, data: bytes) -> None:
    """Write an object, replacing any other; never in parts where one request can carry it."""
    if "s3" in _protocols(fs) and len(data) <= LARGEST_PUT_BYTES:
        _put_s3(fs, path, data)
    else:
        fs.pipe_file(path, data, **_time_limit(fs, len(data)))


def create_whole(fs: Any, path: str, data: bytes, mark: str) -> None:
    """Write an object unless there is one: then FileExistsError, or an answer of status 412."""
    if "s3" in _protocols(fs):
        _put_s3(fs, path, data, IfNoneMatch="*", Metadata={_MARK: mark})
    elif GCS & set(_protocols(fs)):
        fs.pipe_file(path, data, mode="create", metadata={_MARK: mark}, **_time_limit(fs, len(data)))
    else:
        fs.pipe_file(path, data, mode="create", **_time_limit(fs, len(data)))


def is_marked(fs: Any, path: str, mark: str) -> bool | None:
    """Whether an object was created by the call that made this mark; None where a store keeps no marks."""
    if GCS & set(_protocols(fs)):
        return bool((fs.info(path).get("metadata") or {}).get(_MARK) == mark)
    if "s3" not in _protocols(fs):
        return None
    bucket, _, key = path.partition("/")
    return bool(fs.call_s3("head_object", Bucket=bucket, Key=key)["Metadata"].get(_MARK) == mark)


def _put_s3(fs: Any, path: str, data: bytes, **conditions: Any) -> None:
    bucket, _, key = path.partition("/")
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **conditions, **_time_limit(fs, len(data)))


def _time_limit(fs: Any, size_bytes: int) -> dict[str, float]:
    """fsspec's limit for a whole call: the clients have none for a body that drips, or that nobody takes."""
    return {"timeout": READ_TIMEOUT_S + size_bytes / SLOWEST_BYTES_PER_S} if getattr(fs, "async_impl", False) else {}


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


class RangedFile(io.RawIOBase):
    """A seekable file over a function that reads ranges: each is one request, with the retries that it has.

    whole: a range that comes short is an OSError. `failed` keeps the error of a range that could not be read, which a
    library in between may dress up.
    """

    def __init__(self, read_range: Callable[[int, int], bytes], size_bytes: int, *, whole: bool = True) -> None:
        self._read_range, self.size, self._at, self._whole = read_range, size_bytes, 0, whole
        self.failed: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), max(0, self.size - self._at))
        try:
            data = self._read_range(self._at, length) if length else b""
            if self._whole and len(data) != length:
                raise OSError(f"{length} bytes were asked for at offset {self._at}, {len(data)} came")
        except Exception as error:
            self.failed = error
            raise
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
