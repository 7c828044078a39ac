"""Removes credentials from text: URIs keep their host and lose their user part, known secrets become `***`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

MASK = "***"
_MIN_SECRET_LENGTH = 4  # a shorter value would blank out ordinary words
_USER_PART = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"<>@]+(?:@[^/\s'\"<>@]+)*@")
_NAMED_VALUE = re.compile(
    r"(?i)(?P<name>\b[\w-]*(?:password|passwd|secret|token|api_?key|access_?key|signature|credential)=)[^&\s'\";,)]+"
)
_SECRET_NAME = re.compile(r"(?i)(?:password|passwd|secret|token$|_token_|api_?key|access_key$)")


class Redactor:
    """Masks user parts of URIs, `password=...`-like pairs and a set of literal secrets in any text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {s for s in secrets if len(s) >= _MIN_SECRET_LENGTH}
        self._literals = sorted(known, key=lambda s: (-len(s), s))

    @classmethod
    def for_uri(cls, uri: str) -> Redactor:
        """The secrets of `uri` plus those that this process's environment holds under telling names."""
        from_env = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
        return cls(secrets_of(uri) | from_env)

    def __call__(self, text: str) -> str:
        for literal in self._literals:
            text = text.replace(literal, MASK)
        text = _USER_PART.sub(lambda m: f"{m['scheme']}{MASK}@", text)
        return _NAMED_VALUE.sub(lambda m: f"{m['name']}{MASK}", text)


def masked_uri(uri: str) -> str:
    """A URI to show to people, even a malformed one: everything up to its last `@` is masked."""
    return Redactor.for_uri(uri)(re.sub(r"://.*@", f"://{MASK}@", uri))


def secrets_of(uri: str) -> set[str]:
    """The password of a URI (or its only user part, often a token), as written and percent-decoded."""
    try:
        user_part = urlsplit(uri).netloc.rpartition("@")[0]
    except ValueError:
        return set()
    user, _, password = user_part.partition(":")
    secret = password or user
    return {secret, unquote(secret)} - {""}


def without_credentials(uri: str) -> str:
    """`uri` without its user part."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def store_identity(uri: str) -> str:
    """What tells one tracking store from another, free of credentials: two spellings of a sqlite path agree."""
    path = sqlite_path(uri)
    if path is not None:
        return f"sqlite:///{path}"
    parts = urlsplit(without_credentials(uri))
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def sqlite_path(uri: str) -> Path | None:
    """The absolute file of a sqlite URI, or None for any other scheme."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
