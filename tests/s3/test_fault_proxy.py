"""The proxy between tests and a server does what its rules say, and nothing else."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.support.fault_proxy import FaultProxy

pytestmark = pytest.mark.integration


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent; keeps connections open."""

    protocol_version = "HTTP/1.1"
    seen: list[str]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def do_GET(self) -> None:
        self._answer(b"0123456789" * 10_000)

    def do_HEAD(self) -> None:
        self._answer(b"0123456789")

    def _answer(self, body: bytes) -> None:
        self.server.seen.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        self.send_response(200)
        if self.path.startswith("/chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (body[:7], body[7:]):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Silence."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(server: ThreadingHTTPServer) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", server.server_address[1]) as proxy:
        yield proxy


def connect(proxy: FaultProxy, timeout: float = 5) -> http.client.HTTPConnection:
    parts = urlsplit(proxy.url)
    return http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=timeout)


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection.request(method, path, body or None)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_without_rules_everything_passes_on_one_connection(proxy: FaultProxy) -> None:
    connection = connect(proxy)
    assert ask(connection, "PUT", "/a", b"x" * 300_000) == (200, b"x" * 300_000)
    assert ask(connection, "HEAD", "/a") == (200, b"")
    assert ask(connection, "GET", "/chunked") == (200, b"0123456789" * 10_000)
    assert ask(connection, "GET", "/a") == (200, b"0123456789" * 10_000)
    assert proxy.requests == 4


def test_a_go_ahead_is_passed_on(proxy: FaultProxy) -> None:
    connection = connect(proxy)
    connection.putrequest("PUT", "/a")
    connection.putheader("Content-Length", "3")
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    connection.send(b"abc")
    assert connection.getresponse().read() == b"abc"


def test_refusals_are_counted_and_end(proxy: FaultProxy, server: ThreadingHTTPServer) -> None:
    fault = proxy.fail("status", method="PUT", path="^/a$", times=2)
    answers = [ask(connect(proxy), "PUT", path, b"x")[0] for path in ("/a", "/b", "/a", "/a")]
    assert answers == [503, 200, 503, 200]
    assert fault.struck == 2
    assert server.seen == ["PUT /b", "PUT /a"]  # type: ignore[attr-defined]


def test_a_lost_answer_reached_the_server_and_a_reset_did_not(proxy: FaultProxy, server: ThreadingHTTPServer) -> None:
    proxy.fail("reset", times=1)
    proxy.fail("lost_answer", times=1)
    for path in ("/reset", "/lost"):
        with pytest.raises((ConnectionError, http.client.BadStatusLine)):
            ask(connect(proxy), "PUT", path, b"x")
    assert server.seen == ["PUT /lost"]  # type: ignore[attr-defined]
    assert proxy.struck == {"reset": 1, "lost_answer": 1}


@pytest.mark.parametrize("path", ["/a", "/chunked"])
def test_a_truncated_answer_is_not_whole(proxy: FaultProxy, path: str) -> None:
    proxy.fail("truncate", times=1)
    with pytest.raises(http.client.IncompleteRead):
        ask(connect(proxy), "GET", path)
    assert len(ask(connect(proxy), "GET", path)[1]) == 100_000


def test_a_stalled_request_is_never_answered(proxy: FaultProxy) -> None:
    proxy.fail("stall", times=1)
    with pytest.raises(TimeoutError):
        ask(connect(proxy, timeout=0.3), "GET", "/a")
    assert ask(connect(proxy), "GET", "/a")[0] == 200


def test_a_share_of_requests_is_drawn_from_the_seed(server: ThreadingHTTPServer) -> None:
    def outcomes(seed: int) -> list[int]:
        with FaultProxy("127.0.0.1", server.server_address[1], seed=seed) as proxy:
            proxy.fail("status", share=0.5, code=500)
            return [ask(connect(proxy), "GET", "/a")[0] for _ in range(12)]

    assert outcomes(1) == outcomes(1) != outcomes(2)
    assert set(outcomes(1)) == {200, 500}
