"""Servers that nobody here runs: they send too much, too slowly, or to somewhere else."""

from __future__ import annotations

import asyncio
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem

from pipeline.source.reading.parquet import UriReader
from pipeline.source.reading.rows import Failure, fetch
from pipeline.source.reasons import Reason
from pipeline.storage import root as storage
from pipeline.storage import stores, web
from pipeline.storage.errors import StoreUnavailable
from pipeline.storage.root import ObjectInfo, Root

pytestmark = pytest.mark.integration
BODY = bytes(range(256)) * 4


class Server(http.server.ThreadingHTTPServer):
    """Answers by the path: see `Handler`; counts the bytes of bodies that were taken."""

    daemon_threads = True
    sent = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name.startswith("to="):
            place = {"below": "plain", "above": "/other/plain", "outside": "http://example.com/data/plain"}.get(
                name[3:]
            )
            port = self.server.server_address[1]
            self.send_response(302)
            self.send_header("Location", place or f"http://127.0.0.2:{port}/data/plain")
            self.end_headers()
            return
        if name == "loop":
            self.send_response(302)
            self.send_header("Location", "loop")
            self.end_headers()
            return
        ranged = name == "ranged" and "Range" in self.headers
        self.send_response(206 if ranged else 200)
        if name in ("plain", "ranged"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            body = BODY[int(first) : int(last) + 1] if ranged else BODY
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.end_headers()
        try:
            while True:  # "endless" and "slow"
                chunk = b"x" if name == "slow" else bytes(1 << 20)
                self.wfile.write(chunk)
                self.server.sent += len(chunk)
                time.sleep(0.05 if name == "slow" else 0)
        except OSError:
            return  # the other side has had enough


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def root(server: Server, monkeypatch: pytest.MonkeyPatch) -> Root:
    monkeypatch.setattr(storage, "_BACKOFF_CAP_S", 0.0)
    return Root(f"http://127.0.0.1:{server.server_address[1]}/data")


def read(root: Root, uri: str, max_bytes: int = 1 << 20) -> bytes | Failure:
    return UriReader(root, [root.uri], max_bytes).read(uri if "://" in uri else f"{root.uri}/{uri}")


def test_a_range_is_what_was_asked_for_whether_the_server_knows_ranges_or_not(root: Root) -> None:
    for name in ("plain", "ranged"):
        assert root.read_range(name, 100, 50) == BODY[100:150]
        assert root.read_range(name, 1000, 500) == BODY[1000:]
        assert read(root, name) == BODY


def test_no_more_is_read_than_may_be(root: Root, server: Server) -> None:
    server.sent = 0
    found = read(root, "endless", max_bytes=1 << 20)
    assert isinstance(found, Failure)
    assert found.reason is Reason.TOO_MANY_BYTES
    time.sleep(0.2)
    assert server.sent < 32 << 20, "the sockets' buffers, and no more"


def test_a_body_that_drips_ends_in_time(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(web, "SLOWEST_BYTES_PER_S", 1 << 30)
    began = time.monotonic()
    found = read(root, "slow")
    assert isinstance(found, Failure)
    assert found.reason is Reason.READ_FAILED
    assert time.monotonic() - began < 30


class Drip(AsyncFileSystem):  # type: ignore[misc]
    """A store of fsspec's as those of GCS and Azure are; its bodies never end."""

    protocol = "drip"

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": 10, "type": "file", "etag": "1"}


@pytest.mark.parametrize("how", ["whole", "range", "version"])
def test_every_store_is_given_up_in_time(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("drip", Drip, clobber=True)
    monkeypatch.setattr(storage, "_BACKOFF_CAP_S", 0.0)
    monkeypatch.setattr(stores, "READ_TIMEOUT_S", 0.1)
    monkeypatch.setattr(stores, "SLOWEST_BYTES_PER_S", 1 << 40)
    root = Root("drip://bucket/data")
    reads: dict[str, Callable[[], bytes | Failure]] = {
        "whole": lambda: root.read_bytes("x"),
        "range": lambda: root.read_range("x", 0, 5),
        "version": lambda: root.read_version("x", ObjectInfo("x", 10, "1", None), 0, 5),
    }
    with pytest.raises(StoreUnavailable, match="the store does not answer"):
        reads[how]()
    found = fetch(root, "x", 100, 10, ObjectInfo("x", 10, "1", None))
    assert isinstance(found, Failure)
    assert found.reason is Reason.READ_FAILED


@pytest.mark.parametrize("name", ["endless", "plain"])
def test_a_server_that_sends_more_than_it_listed_is_cut(root: Root, server: Server, name: str) -> None:
    server.sent = 0
    found = fetch(root, name, 1 << 20, 10, ObjectInfo(name, 10, None, None))
    assert found == BODY if name == "plain" else isinstance(found, Failure)
    assert server.sent < 32 << 20


@pytest.mark.parametrize("name", ["to=above", "to=outside", "to=elsewhere", "loop"])
def test_redirects_lead_nowhere_else(root: Root, name: str) -> None:
    assert read(root, "to=below") == BODY
    found = read(root, name)
    assert isinstance(found, Failure)
    assert found.reason is Reason.URI_REFUSED, found


def test_names_that_lead_inside_are_refused_unless_they_are_named(
    root: Root, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = Root(root.uri.replace("127.0.0.1", "localhost"))
    found = read(inside, "plain")
    assert isinstance(found, Failure)
    assert (found.reason, "localhost has no public address" in found.message) == (Reason.URI_REFUSED, True)
    monkeypatch.setenv(web.PRIVATE_HOSTS, "a.example,localhost")
    assert read(inside, "plain") == BODY


@pytest.mark.parametrize("part", ["..", "%2e%2e", "%2E.", "%252e%252e", "a/%2e%2e/%2e%2e", "..%5c.."])
def test_encoded_dots_leave_no_prefix(root: Root, part: str) -> None:
    for uri in (f"{part}/other/plain", f"{root.uri}/{part}/other/plain"):
        found = UriReader(root, [root.uri], 1 << 20).read(uri)
        assert isinstance(found, Failure)
        assert found.reason is Reason.URI_REFUSED
