from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.tracking.config import check_access, check_uri
from tests.support.mlflow_server import free_port

SECRET = "planted-Secret-77"


class Gatekeeper(ThreadingHTTPServer):
    """Answers 200 to one Authorization header and `status` to all others."""

    wanted = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
    status = 401

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def gatekeeper() -> Iterator[Gatekeeper]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers.get("Authorization") == server.wanted
            self.send_response(200 if good else server.status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = Gatekeeper(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("mlflow.db", "scheme ''"),
        ("ftp://host/x", "scheme 'ftp'"),
        ("http:///path", "names no host"),
        ("postgresql:///db", "names no host"),
        ("http://host:port", "cannot be parsed"),
        ("sqlite:///", "names a folder"),
        ("sqlite://", "names no database file"),
        ("sqlite:///:memory:", "names no database file"),
        (f"http://me:{SECRET}@host:port", "cannot be parsed"),
        (f"nosuch://me:{SECRET}@host", "scheme 'nosuch'"),
    ],
)
def test_a_uri_that_can_never_work_is_a_configuration_error(uri: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        check_uri(uri)
    assert SECRET not in str(caught.value)
    assert "tracking.uri" in str(caught.value)


def test_a_sqlite_file_that_is_a_folder_or_lies_below_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names a folder"):
        check_uri(f"sqlite:///{tmp_path}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="folder cannot be made"):
        check_uri(f"sqlite:///{tmp_path}/file/mlflow.db")


@pytest.mark.parametrize("uri", ["https://host", "http://u:p@host:5000/x", "postgresql+psycopg://u:p@db/mlflow"])
def test_a_uri_that_may_work_passes(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_us_is_a_configuration_error(gatekeeper: Gatekeeper, status: int) -> None:
    gatekeeper.status = status
    uri = gatekeeper.uri.replace("http://", f"http://me:{SECRET}x@")
    with pytest.raises(ConfigError, match=f"refuses the credentials .HTTP {status}.") as caught:
        check_access(uri)
    assert SECRET not in str(caught.value)


def test_credentials_are_found_where_mlflow_finds_them(
    gatekeeper: Gatekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="refuses"):
        check_access(gatekeeper.uri)
    check_access(gatekeeper.uri.replace("http://", f"http://me:{SECRET}@"))
    with monkeypatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_USERNAME", "me")
        environment.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        check_access(gatekeeper.uri)
    file = Path.home() / ".mlflow" / "credentials"
    file.parent.mkdir()
    file.write_text(f"[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = {SECRET}\n")
    check_access(gatekeeper.uri)
    file.write_text("no section at all")
    with pytest.raises(ConfigError, match="refuses"):
        check_access(gatekeeper.uri)
    gatekeeper.wanted = f"Bearer {SECRET}"
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    check_access(gatekeeper.uri)


def test_a_signing_plugin_is_not_second_guessed(gatekeeper: Gatekeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "some-plugin")
    check_access(gatekeeper.uri)


def test_a_server_that_does_not_answer_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_access(f"http://me:{SECRET}@127.0.0.1:{free_port()}")
    assert "recording locally" in caplog.text
    assert SECRET not in caplog.text


def test_a_server_in_trouble_is_only_a_warning(gatekeeper: Gatekeeper, caplog: pytest.LogCaptureFixture) -> None:
    gatekeeper.status = 503
    with caplog.at_level(logging.WARNING):
        check_access(gatekeeper.uri)
    assert "HTTP 503" in caplog.text
