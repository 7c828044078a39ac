"""A dataset as pages in a browser: what it holds, its pictures, what was left out and why, where it came from.

    address --> Pages: values out of the ledger and of the row groups that are shown --> template --> one HTML page
    picture --> the bytes of one row: stored ones, a latent through a codec that the user named, or false colours

Everything is made when it is asked for, and nothing is kept, written or sent anywhere. What a dataset says is text:
it is escaped, never followed, and its codec is opened only where the user names one. Only this machine is answered
(the loopback address), only under the secret part of the address that the start prints, only by names that mean this
machine (a stranger's page, whose name is made to lead here, is refused), and only GET. Pages have no script.
"""

from __future__ import annotations

import logging
import secrets
import socketserver
import sys
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pipeline.browse.pages import Asked, Pages
from pipeline.errors import ConfigError, InputError
from pipeline.media import render_page
from pipeline.storage.errors import job_error

_log = logging.getLogger(__name__)
HOST = "127.0.0.1"
FIRST_PORT, PORTS = 8420, 40  # tried in turn where no port was asked for
NAMES = ("127.0.0.1", "localhost", "[::1]")  # of this machine, in a request's Host; with any port, as tunnels have it
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_KEPT = "private, max-age=3600"  # a picture: what was opened does not change, and another start has another address
_MOST_TEXT = 200


class PageServer(ThreadingHTTPServer):
    """Pages at a loopback port; `address` is what a person opens."""

    daemon_threads = True

    def __init__(self, pages: Pages, port: int) -> None:
        self.pages, self.secret = pages, secrets.token_urlsafe(12)
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """As the library does it, but nobody is asked for this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; anything else is told on the terminal."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """With the part that nobody else can guess."""
        return f"http://{HOST}:{self.server_port}/{self.secret}/"


def open_server(pages: Pages, port: int | None) -> PageServer:
    """A server that listens; ConfigError where the port that was asked for is taken. None: the first free one."""
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,)
    for number in ports:
        try:
            return PageServer(pages, number)
        except (OSError, OverflowError) as error:
            trouble = getattr(error, "strerror", None) or str(error)
    raise ConfigError(
        f"No port is free: {trouble}" if port is None else f"The port cannot be used: {trouble}",
        key="--port",
        value=f"{ports[0]} to {ports[-1]}" if port is None else port,
        rule="a number from 1024 to 65535 that no other program listens on",
        next_step="name another port" + ("" if port is None else ", or leave --port out: a free one is taken"),
    )


class _Handler(BaseHTTPRequestHandler):
    """One connection; answers come from the server's `Pages`."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "latentloom", ""
    timeout = 60.0

    def do_GET(self) -> None:
        """A page or a picture."""
        try:
            status, body, kind, kept = self.answer()
        except Exception as error:  # noqa: BLE001 - one page fails, and says so; the others go on
            known = job_error(error)
            if known is None:
                _log.error("%s", traceback.format_exc())
                known = InputError("This is a bug in latentloom; the terminal shows where.")
            lines = [part for part in (known.what, known.rule, known.next_step) if part]
            wrong = HTTPStatus.BAD_REQUEST if job_error(error) else HTTPStatus.INTERNAL_SERVER_ERROR
            status, body, kind, kept = self._page(wrong, "", "error", {"lines": lines})
        self._send(status, body, kind, kept)

    def do_POST(self) -> None:
        """Refuse this method, and every other but GET."""
        self.close_connection = True  # a body that came with it is not read
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n", "text/plain; charset=utf-8", "no-store")

    do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def answer(self) -> tuple[HTTPStatus, bytes, str, str]:
        """(status, body, media type, how long it may be kept) of what is asked for, where it may be."""
        parts = urlsplit(self.path)
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        # Another page's scripts and pictures come from elsewhere; a person may follow a link from anywhere.
        elsewhere = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        asked = self.headers.get("Sec-Fetch-Mode", "navigate") == "navigate"
        secret, slash, page = parts.path.removeprefix("/").partition("/")
        inside = slash and secrets.compare_digest(secret.encode(), self.server.secret.encode())
        if name not in NAMES or not inside or (elsewhere and not asked):
            return HTTPStatus.FORBIDDEN, b"use the address that the start has printed\n", "text/plain", "no-store"
        query, pages = dict(parse_qsl(parts.query)), self.server.pages
        if page == "picture":
            body, kind = pages.picture(_number(query, "row"), large="large" in query, beside="beside" in query)
            return HTTPStatus.OK, body, kind, _KEPT
        values: dict[str, Any] | None = None
        if page == "":
            values = pages.overview()
        elif page == "rows":
            values = pages.rows(_asked(query))
        elif page == "row":
            values = pages.row(_number(query, "row"))
        elif page == "left-out":
            places = (_number(query, name, 0) for name in ("file", "skip"))
            values = pages.left_out(query.get("outcome", ""), query.get("reason", ""), *places)
        elif page == "lineage":
            values = pages.lineage()
        elif page == "compare" and pages.beside is not None:
            values = pages.compare(_asked(query))
        if values is None:
            return self._page(HTTPStatus.NOT_FOUND, "", "error", {"lines": ["There is no such page."]})
        return self._page(HTTPStatus.OK, page, page or "overview", values)

    def _page(
        self, status: HTTPStatus, page: str, name: str, values: Mapping[str, Any]
    ) -> tuple[HTTPStatus, bytes, str, str]:
        opened = self.server.pages.opened
        shell = {
            "tabs": self.server.pages.tabs,
            "page": page or ".",
            "kind": opened.kind,
            "opened_s": opened.opened_s,
        }
        text = render_page(f"browse_{name}.html", title=opened.data.uri, **shell, **values)
        return status, text.encode(), "text/html; charset=utf-8", "no-cache"

    def _send(self, status: HTTPStatus, body: bytes, kind: str, kept: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Cache-Control": kept}.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what went wrong."""


def _number(query: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InputError(f"{name} is {str(text)[:40]!r}", rule="a whole number of at most 18 digits")
    return int(text)


def _asked(query: Mapping[str, str]) -> Asked:
    label = _number(query, "label") if query.get("label") else None
    return Asked(query.get("bucket", ""), label, query.get("text", "")[:_MOST_TEXT], _number(query, "from", 0))


def serve(
    uri: str,
    *,
    codec: str | None = None,
    beside: str | None = None,
    tracking: str,
    port: int | None = None,
    ready: Callable[[PageServer], object],
) -> None:
    """Open a dataset and answer until the process is interrupted; `ready` is told once the server listens.

    Raises what opening it raises, and ConfigError where no port is free.
    """
    pages = Pages(uri, codec, beside, tracking)
    with open_server(pages, port) as server:
        ready(server)
        server.serve_forever()
