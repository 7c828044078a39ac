"""What goes wrong at a store, told apart: which exceptions there are, which pass by themselves, and how to say it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def storage_errors() -> tuple[type[Exception], ...]:
    """What a store may raise: OSError, and the S3 client's own errors, which are none (an unreachable endpoint)."""
    botocore = sys.modules.get("botocore.exceptions")
    return (OSError,) if botocore is None else (OSError, botocore.BotoCoreError, botocore.ClientError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _status(error: BaseException) -> int | None:
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return int(status) if status is not None else None
    return None


def already_exists(error: BaseException) -> bool:
    """Whether a store refused to create an object because one of that key is there."""
    return _status(error) == 412 or isinstance(error, FileExistsError)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later: an overloaded or unreachable store, a broken connection."""
    if isinstance(error, _FINAL):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 429)
    names = {type(c).__name__ for c in _causes(error)}
    if names & {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound"}:
        return False
    return isinstance(error, storage_errors())


def describe(error: BaseException) -> str:
    """An error in one line, without the request's headers or any credential."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:300]}"
