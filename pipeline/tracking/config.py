"""The `tracking:` section of every job, configurations of the jobs about runs, and what a tracking URI may be."""

from __future__ import annotations

import base64
import configparser
import logging
import os
import posixpath
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import Field, field_validator, model_validator

from pipeline.config import SECRET_NAME, StrictModel
from pipeline.errors import ConfigError, InputError

# -- Tracking URIs: what of them may be shown, and whether the server behind one can work for us ---------------


# -- Removes credentials from text: URIs keep their host and lose their user part, known secrets become `***` --


MASK = "***"
_MIN_SECRET_LENGTH = 4  # a shorter value would blank out ordinary words
_USER_PART = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s'\"<>@]+(?:@[^/\s'\"<>@]+)*@")
_NAMED_VALUE = re.compile(
    r"(?i)(?P<name>\b(?:[\w-]*(?:password|passwd|secret|token|api_?key|access_?key|signature|credential)=|sig=|"
    r"bearer +|authorization: *basic +))[^&\s'\";,)]+"
)


class Redactor:
    """Masks user parts of URIs, `password=...`-like pairs, signatures, bearers and a set of literal secrets."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {s for s in secrets if len(s) >= _MIN_SECRET_LENGTH}
        self._literals = sorted(known, key=lambda s: (-len(s), s))

    @classmethod
    def for_uri(cls, uri: str) -> Redactor:
        """The secrets of `uri` plus those that this process's environment holds under telling names."""
        from_env = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
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


# -- Checks a tracking URI at job start: what cannot ever work stops the job, what may come back does not ------


_log = logging.getLogger(__name__)
_KEY = "tracking.uri"
_RULE = "sqlite:///file, http(s)://host[:port][/path], postgresql://... or mysql://..."
_DATABASE = re.compile(r"^(postgresql|mysql|mssql)(\+[a-z0-9]+)?$")
PROBE_TIMEOUT_S = 3.0


def check_uri(uri: str) -> None:
    """Raise ConfigError when `uri` cannot name a tracking store; touches no network."""
    shown = masked_uri(uri)
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise _malformed(shown, "it cannot be parsed") from None
    if parts.scheme == "sqlite":
        path = sqlite_path(uri)
        if path is None or path.name in ("", ":memory:"):
            raise _malformed(shown, "it names no database file")
        if path.is_dir():
            raise _malformed(shown, "it names a folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _malformed(shown, f"its folder cannot be made: {error.strerror}") from None
    elif parts.scheme in ("http", "https") or _DATABASE.match(parts.scheme):
        if not host:
            raise _malformed(shown, "it names no host")
    else:
        raise _malformed(shown, f"the scheme {parts.scheme!r} is none of those known")


def check_readable(uri: str) -> None:
    """Raise what the other checks raise, and InputError for a file that is not there: reading must not make one."""
    check_uri(uri)
    check_access(uri)
    file = sqlite_path(uri)
    if file is not None and not file.exists():
        raise InputError(
            f"There is no tracking store {file}",
            key=_KEY,
            value=masked_uri(uri),
            rule="the store that the jobs recorded their runs in",
            next_step="name it, or run this in the working directory of those jobs",
        )


def check_access(uri: str, timeout_s: float = PROBE_TIMEOUT_S) -> None:
    """Ask an HTTP server one harmless question; ConfigError when it refuses us, a warning when it does not answer."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    if os.environ.get("MLFLOW_TRACKING_AUTH") or os.environ.get("MLFLOW_TRACKING_AWS_SIGV4"):
        return  # signed by a plug-in of mlflow's, which this plain request cannot imitate
    shown = without_credentials(uri)
    url = f"{shown.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    request = urllib.request.Request(url, headers=_authorization(uri))
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ConfigError(
                f"The tracking server refuses the credentials (HTTP {error.code})",
                key=_KEY,
                value=shown,
                rule="the server must let this user read and write experiments",
                next_step="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)",
            ) from None
        reason = f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = Redactor.for_uri(uri)(str(error))
    _log.warning("tracking server %s does not answer (%s): recording locally, sending later", shown, reason)


def _malformed(shown: str, why: str) -> ConfigError:
    return ConfigError(
        f"The tracking store cannot be used: {why}",
        key=_KEY,
        value=shown,
        rule=_RULE,
        next_step="correct tracking.uri, or set tracking.enabled=false",
    )


def _authorization(uri: str) -> dict[str, str]:
    """The header mlflow's own client would send: the URI's user part, the environment, then its credentials file."""
    parts = urlsplit(uri)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if not user:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not user:
        parser = configparser.ConfigParser()
        try:
            parser.read(Path.home() / ".mlflow" / "credentials")
        except (configparser.Error, OSError, RuntimeError):
            parser = configparser.ConfigParser()  # a file that cannot be read is no file
        section = parser["mlflow"] if parser.has_section("mlflow") else {}
        user = section.get("mlflow_tracking_username", "")
        password = section.get("mlflow_tracking_password", "")
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
    return {"Authorization": f"Bearer {token}"} if token else {}


REGISTERED = "models:/"  # what the URI of a registered model begins with


class TrackingConfig(StrictModel):
    """Where runs are recorded, and where records wait until they are."""

    enabled: bool = Field(True, description="false: nothing is recorded anywhere")
    uri: str = Field(
        "sqlite:///mlflow.db",
        description="MLflow store: sqlite:///file (one machine), http(s)://server, or a database URI; "
        "credentials belong in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )
    experiment: str = Field(
        "latentloom", min_length=1, max_length=500, description="MLflow experiment, made when absent"
    )
    journal_dir: str = Field(
        ".latentloom/journal",
        min_length=1,
        description="local folder in which records wait for the store; must outlive the process, not the machine",
    )
    tags: dict[str, str] = Field(default_factory=dict, description="tags added to the run, such as team: vision")
    close_timeout_s: float = Field(
        60.0, gt=0, description="longest wait at the end of a job for the store to take what is left"
    )

    @field_validator("tags")
    @classmethod
    def _tags_are_mlflows(cls, value: dict[str, str]) -> dict[str, str]:
        # As the store checks them, which is too late: by then there is a run, and work.
        for name, text in value.items():
            path = posixpath.normpath(name)
            if not re.fullmatch(r"[/\w.\- :]{1,250}", name) or path != name or path.startswith(("..", "/")):
                raise ValueError(
                    f"{name!r:.100} is no name of an MLflow tag: letters, digits and _ - . / : or spaces, at most "
                    "250, and as a path no other than itself"
                )
            if len(text) > 8000:
                raise ValueError(f"the tag {name} has {len(text)} characters, over MLflow's 8000")
        return value


class RegistryConfig(StrictModel):
    """The model registry beside the tracking store."""

    name: str | None = Field(
        None,
        pattern=r"^[^/@:]+$",
        max_length=250,
        description="Name under which the finished model becomes a version in MLflow's model registry; null: none.",
    )


class EvaluationConfig(StrictModel):
    """The evaluation that decides."""

    uri: str = Field(..., min_length=1, description="Output of the evaluate job: a directory or fsspec URI.")


class PromotedModelConfig(StrictModel):
    """The registered model, and the alias that is to move."""

    name: str = Field(..., pattern=r"^[^/@:]+$", description="Name in the registry: registry.name of the training.")
    alias: str = Field(
        "production",
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
        description="Alias to move, asked for as models:/NAME@ALIAS.",
    )
    version: int | None = Field(
        None, ge=1, description="Version the evaluation must be about; null: the one that it is about."
    )


class PromoteJobConfig(StrictModel):
    """Everything the promote job reads."""

    evaluation: EvaluationConfig = Field(..., description="The evaluation that decides.")
    model: PromotedModelConfig = Field(..., description="What is promoted.")
    at_least: dict[str, float] = Field({}, description="Figure -> least value, such as accuracy: 0.9.")
    at_most: dict[str, float] = Field({}, description="Figure -> largest value, such as frechet: 20.")
    cautious: bool = Field(
        True, description="Judge a figure by the unfavourable end of its interval; false: by the value itself."
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="The tracking store with the registry.")

    @model_validator(mode="after")
    def _asks_something(self) -> PromoteJobConfig:
        if not self.at_least and not self.at_most:
            raise ValueError("give at_least or at_most: a promotion without thresholds checks nothing")
        if self.model.alias == "latest":
            raise ValueError("model.alias must be another than latest, which always means the newest version")
        return self


class SyncTrackingJobConfig(StrictModel):
    """Everything the sync_tracking job reads."""

    tracking: TrackingConfig = Field(
        TrackingConfig(), description="The tracking section of the jobs whose records wait on this machine."
    )
    any_server: bool = Field(
        False, description="Also send journals written for another tracking.uri: for a server that has moved."
    )


class LineageJobConfig(StrictModel):
    """Everything the lineage job reads."""

    start: str = Field(
        ...,
        min_length=1,
        description="Where to start: a generated image file, a run id, or the root of a dataset (path or URI).",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="The tracking store that knows the runs.")


def resolve_paths(tracking: TrackingConfig, base: Path | None = None) -> TrackingConfig:
    """`tracking` with its relative sqlite file and journal folder made absolute.

    Call it in the driver before handing the section to another process, whose working directory may differ.
    """
    root = (base or Path.cwd()).absolute()
    uri, prefix = tracking.uri, "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        uri = f"{prefix}{root / uri.removeprefix(prefix)}"
    return tracking.model_copy(update={"uri": uri, "journal_dir": str(root / tracking.journal_dir)})
