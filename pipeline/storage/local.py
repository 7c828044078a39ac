"""Writing and listing on a local disk: files appear whole, under their name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Iterator

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
