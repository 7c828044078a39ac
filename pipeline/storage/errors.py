"""What goes wrong at a store, told apart: which exceptions there are, which pass by themselves, and how to say it."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipeline.errors import InputError, PipelineError, StoppedError

_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# The clients' own failures that no repetition can mend: they are about the configuration of this process.
_CONFIGURATION = {
    "NoCredentialsError": "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role",
    "PartialCredentialsError": "one half of the credentials is missing: set both AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "AWS_PROFILE names a profile that is not configured here",
    "ParamValidationError": "the bucket or key has a form that S3 does not allow",
    "TokenRetrievalError": "the login has expired: log in again",
    "UnauthorizedSSOTokenError": "the login has expired: log in again",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set: unset it where the hub is to be asked",
}
# A local disk's: a full one apart, which time may help.
_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
}
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}  # of status 400
_CODES = {
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "AccessDenied": "the store does not let this access key do this",
    "403": "the store does not let this access key do this, or does not know it",
    "ExpiredToken": "the session token has expired",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the store's",
    "NoSuchBucket": "the bucket does not exist",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "301": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "400": "the store does not understand the request: another region, or an endpoint that is no S3",
    "InvalidBucketName": "the bucket's name has a form that the store does not allow",
    "QuotaExceeded": "the store's quota is used up",
}
_UNREACHABLE = {
    "EndpointConnectionError": "the endpoint cannot be reached: check AWS_ENDPOINT_URL and the network",
    "ConnectTimeoutError": "the endpoint cannot be reached: check AWS_ENDPOINT_URL and the network",
    "ClientConnectorDNSError": "the endpoint's name cannot be resolved: check AWS_ENDPOINT_URL and the network",
    "SSLError": "the server's certificate is not trusted, or it does not speak TLS",
    "ReadTimeoutError": "the store does not answer",
    "FSTimeoutError": "the store does not answer",
    "ClientPayloadError": "the answer broke off half-way",
    "IncompleteReadError": "the answer broke off half-way",
    "ResponseStreamingError": "the answer broke off half-way",
    "ConnectionClosedError": "the connection broke",
}
_USER_PART = re.compile(r"(://)[^/\s'\"<>@]+@")


class PlaceRefused(PermissionError):
    """A request to a web server would lead to a place that nobody allowed."""


class ObjectChanged(InputError):
    """An object is not, or not any more, the version that was asked for."""


def changed(uri: str) -> ObjectChanged:
    """Of an object that was listed."""
    return ObjectChanged(
        f"{without_user(uri)} has changed since it was listed",
        rule="what is read is the version that the listing showed",
        next_step="run the same command again: it lists anew",
    )


class StoreUnavailable(OSError):
    """A store did not answer, or only with errors, for as long as it was asked: what was written before stays."""


_answered: set[str] = set()  # scheme and bucket of every store that this process has had an answer from


def note_answer(uri: str) -> None:
    """The store of a URI has answered this process: should it fall silent later, that passes."""
    _answered.add(_store_of(uri))


def _store_of(uri: str) -> str:
    parts = urlsplit(without_user(uri))
    return f"{parts.scheme}://{parts.netloc}"


def storage_errors() -> tuple[type[Exception], ...]:
    """What a store may raise: OSError, and its clients' own errors, which are none (an unreachable endpoint)."""
    found: list[type[Exception]] = [OSError]
    clients = {"botocore.exceptions": ("BotoCoreError", "ClientError"), "aiohttp": ("ClientError",)}
    for module, names in {**clients, **dict.fromkeys(("httpx", "httpx2"), ("HTTPError",))}.items():
        # Of a module that another thread is just importing there may be no such name yet: nobody has raised it.
        known = [getattr(sys.modules.get(module), name, None) for name in names]
        found += [error for error in known if error is not None]
    return tuple(found)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again while one that it caused is handled is its own cause
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _response(error: BaseException) -> tuple[int | None, str]:
    """(HTTP status, the store's own code) of the answer behind an error; (None, "") when there was no answer."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(status := getattr(response, "status_code", None), int):  # of a hub
            return status, ""
        if isinstance(response, dict):
            told = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str((response.get("Error") or {}).get("Code") or "")
            return (int(told) if told is not None else None), code
    return None, ""


def already_exists(error: BaseException) -> bool:
    """Whether a store refused to create an object because one of that key is there."""
    return _response(error)[0] == 412 or isinstance(error, FileExistsError)


def not_implemented(error: BaseException) -> bool:
    """Whether a store says that it does not know the kind of request."""
    return _response(error)[0] == 501 or isinstance(error, NotImplementedError)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later: an overloaded or unreachable store, a broken connection."""
    if isinstance(error, _FINAL):
        return False
    status, code = _response(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in (408, 409, 429) or code in _PASSING_CODES
    if {type(c).__name__ for c in _causes(error)} & _CONFIGURATION.keys():
        return False
    return isinstance(error, storage_errors())


def plain_error(error: Exception, uri: str) -> Exception:
    """The error as one that says everything in its text, is an OSError, and survives the way between processes.

    StoreUnavailable for what might have passed by itself; errors that are none of a store's come back unchanged.
    """
    if not isinstance(error, storage_errors()):
        return error
    if is_transient(error):
        return _with_text(StoreUnavailable, _explained(error), uri)
    remote = _response(error)[0] is not None or not isinstance(error, OSError)
    if not remote:
        return error
    kind = next((k for k in (FileNotFoundError, PermissionError) if isinstance(error, k)), OSError)
    return _with_text(kind, _explained(error), uri)


_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}


def _with_text(kind: type[OSError], text: str, uri: str) -> OSError:
    return kind(_NUMBERS.get(kind, errno.EIO), text, without_user(uri))


def _explained(error: BaseException) -> str:
    status, code = _response(error)
    names = [type(cause).__name__ for cause in _causes(error)]
    said = _CODES.get(code) or next(
        (text for name in names for text in (_CONFIGURATION.get(name), _UNREACHABLE.get(name)) if text), None
    )
    label = code or (f"HTTP {status}" if status is not None else names[-1])
    return f"{said} ({label})" if said else f"{label}: {_one_line(error)}"


def describe(error: BaseException) -> str:
    """An error in one line, without the request's headers or any credential."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {without_user(str(error.filename))}" if error.filename is not None else ""
        return f"{type(error).__name__}: {without_user(error.strerror)[:300]}{where}"
    remote = _response(error)[0] is not None or not isinstance(error, OSError)
    return f"{type(error).__name__}: {_explained(error) if remote else _one_line(error)}"


def job_error(error: BaseException) -> PipelineError | None:
    """What a store's failure that nobody else has handled means for a job; None for any other error."""
    if isinstance(error, PipelineError):
        return error
    if not isinstance(error, storage_errors()):
        return None
    if isinstance(error, StoreUnavailable):
        if _store_of(str(error.filename)) not in _answered:
            return InputError(
                f"The store never answered: {describe(error)}",
                rule="a job starts when its stores can be reached",
                next_step="check the endpoint, the region and the network, then run the same command again",
            )
        return StoppedError(
            f"The store stayed away too long: {describe(error)}",
            rule="what was committed before stays; nothing half-written is visible",
            next_step="when the store answers again, run the same command again",
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    refused = isinstance(error, OSError) and error.filename is not None and error.errno in _REFUSALS
    remote = not isinstance(error, OSError) or "://" in str(error.filename)
    if not (full or refused or remote):
        return None
    return InputError(
        f"The store refused an operation: {describe(error)}",
        rule="what was committed before stays; nothing half-written is visible",
        next_step=("free space" if full else "see to the store") + ", then run the same command again",
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return without_user(text)[:300]


def without_user(text: str) -> str:
    """Text with the user parts of its URIs, where passwords are, masked."""
    return _USER_PART.sub(r"\1***@", text)


RESTORE = "restore it from a backup or an older version of it"


def unreadable(where: str, why: str, *, key: str | None = None, next_step: str = RESTORE) -> InputError:
    """The error about a file that this project has written and that cannot be what was written."""
    return InputError(
        f"{where} cannot be read: {why}",
        key=key,
        value=None if key is None else where,
        rule="a file that this program has written is not changed by others",
        next_step=next_step,
    )
