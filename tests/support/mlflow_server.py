"""A real MLflow server on loopback that tests may kill, freeze and start again."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.processes import Daemon, free_port

__all__ = ["BasicAuth", "MlflowServer", "free_port"]
START_TIMEOUT_S = 180.0
AUTH = """\
[mlflow]
default_permission = {permission}
database_uri = {database}
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
grant_default_workspace_access = false
"""


@dataclass(frozen=True)
class BasicAuth:
    """The server's administrator, and where it keeps its users."""

    database_uri: str
    user: str = "latentloom-admin"
    password: str = field(default_factory=lambda: f"pw-{secrets.token_hex(12)}")

    def environment(self) -> dict[str, str]:
        """What a client needs to be let in."""
        return {"MLFLOW_TRACKING_USERNAME": self.user, "MLFLOW_TRACKING_PASSWORD": self.password}


class MlflowServer:
    """`mlflow server` with proxied artifacts; one process group, one port over all its lives.

    On sqlite and a folder unless told otherwise. `auth`: users and passwords are asked for; `environment`: what the
    server needs besides, such as the keys of the store its artifacts go to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        backend_uri: str | None = None,
        artifacts_uri: str | None = None,
        auth: BasicAuth | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.auth = folder, auth
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.backend_uri = backend_uri or f"sqlite:///{folder / 'server.db'}"
        self.artifacts_uri = artifacts_uri or str(folder / "artifacts")
        self._environment = dict(environment or {})
        self._server = Daemon(self._command(), folder / "server.log")

    def start(self) -> None:
        """Start and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Seven job processes and a gigabyte less; and nothing is reported to anybody.
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        secret = {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)} if self.auth else {}
        if self.auth:
            path = self.folder / "auth.ini"
            body = AUTH.format(
                permission="EDIT",
                database=self.auth.database_uri.replace("%", "%%"),
                user=self.auth.user,
                password=self.auth.password,
            )
            path.write_text(body)
            secret["MLFLOW_AUTH_CONFIG_PATH"] = str(path)
        self._server.start({**os.environ, **quiet, **secret, **self._environment}, cwd=self.folder)
        self._wait_until_healthy()

    def kill(self) -> None:
        """SIGKILL to the whole group: nothing is finished, nothing is said."""
        self._server.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: connections are accepted by the kernel and never answered."""
        self._server.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._server.send(signal.SIGCONT)

    @property
    def alive(self) -> bool:
        return self._server.alive

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.backend_uri, "--workers", "1"]
        command += ["--artifacts-destination", self.artifacts_uri, "--serve-artifacts"]
        return [*command, "--app-name", "basic-auth"] if self.auth else command

    def _wait_until_healthy(self) -> None:
        give_up = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up and self._server.alive:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        said = self._server.tail()
        self.kill()
        raise RuntimeError(f"mlflow server did not start:\n{said}")
