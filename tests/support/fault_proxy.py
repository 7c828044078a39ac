"""An HTTP proxy on loopback that does to requests what networks and overloaded servers do to them.

    with FaultProxy("127.0.0.1", port) as proxy:
        proxy.fail("status", times=3)                       # the next three: 503 SlowDown
        proxy.fail("truncate", path=r"\\.parquet$", share=0.2)  # a fifth of these answers ends half-way

Requests that no rule picks pass unchanged, in both directions, byte for byte.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, Self

Kind = Literal["status", "reset", "lost_answer", "stall", "truncate", "slow"]
_CHUNK = 64 << 10
_IDLE_S = 120.0
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
# What servers say with a status, and what S3 calls it.
_ANSWERS = {
    401: (b"Unauthorized", b"AccessDenied"),
    403: (b"Forbidden", b"AccessDenied"),
    500: (b"Internal Server Error", b"InternalError"),
    501: (b"Not Implemented", b"NotImplemented"),
    503: (b"Service Unavailable", b"SlowDown"),
}


@dataclass
class Fault:
    """What happens to which requests.

    status: answered with `code` instead of being passed on; reset: the connection breaks before it is passed on;
    lost_answer: it is passed on, and the connection breaks before the answer; stall: nothing, until the proxy is
    closed; truncate: the answer's body ends half-way; slow: it is passed on after `delay_s`.
    """

    kind: Kind
    method: str | None = None
    path: str | None = None
    header: str | None = None
    times: int | None = None
    share: float = 1.0
    code: int = 503
    delay_s: float = 0.5
    struck: int = 0


@dataclass
class FaultProxy:
    """Listens on a port of its own and passes on to host:port; a thread for each connection."""

    host: str
    port: int
    seed: int = 0
    struck: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._faults: list[Fault] = []
        self._chance = random.Random(self.seed)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests = 0

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="fault-proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        # A blocked accept() does not notice that its socket was closed; a last connection does wake it.
        with socket.socket() as last:
            last.connect_ex(self._listener.getsockname())
        self._listener.close()

    def fail(
        self,
        kind: Kind,
        *,
        method: str | None = None,
        path: str | None = None,
        header: str | None = None,
        times: int | None = None,
        share: float = 1.0,
        code: int = 503,
        delay_s: float = 0.5,
    ) -> Fault:
        """Add a rule: requests of this method, with this header, whose path the pattern is found in, at most `times`
        of them, or a seeded random share."""
        fault = Fault(kind, method, path, header, times, share, code, delay_s)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """Remove all rules; what is stalled stays so."""
        with self._lock:
            self._faults.clear()

    def _pick(self, method: str, path: str, head: bytes) -> Fault | None:
        with self._lock:
            self.requests += 1
            for fault in self._faults:
                if fault.method not in (None, method) or fault.struck == fault.times:
                    continue
                if fault.path is not None and not re.search(fault.path, path):
                    continue
                if fault.header is not None and _field(head, fault.header) is None:
                    continue
                if fault.share >= 1.0 or self._chance.random() < fault.share:
                    fault.struck += 1
                    self.struck[fault.kind] += 1
                    return fault
        return None

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._closed.is_set():
                connection.close()
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(_IDLE_S)
        try:
            with client, socket.create_connection((self.host, self.port), timeout=_IDLE_S) as server:
                here, there = _Wire(client), _Wire(server)
                while self._one(here, there):
                    pass
        except (OSError, EOFError, ValueError):
            return  # either side has gone, or does not speak HTTP: the other sees a closed connection

    def _one(self, client: _Wire, server: _Wire) -> bool:
        """One request and its answer; False when the connection ends with it."""
        head = client.head()
        method, path, _ = head.partition(b"\r\n")[0].decode("latin-1").split(" ", 2)
        fault = self._pick(method, path, head)
        kind = fault.kind if fault else None
        if fault is not None and kind == "slow":
            self._closed.wait(fault.delay_s)
        if fault is not None and kind == "status":
            return self._refuse(client, head, fault.code)
        if kind == "stall":
            self._closed.wait()
            return False
        if kind == "reset":
            client.reset()
            return False
        server.send(head)
        if _expects_go_ahead(head):
            answer = server.head()
            if _status(answer) != 100:
                _pass_body(server, client, answer, method, first=answer)
                return False
            client.send(answer)
        _pass_request_body(client, server, head)
        answer = server.head()
        while _status(answer) == 100:
            answer = server.head()
        if kind == "lost_answer":
            client.reset()
            return False
        if kind == "truncate":
            _pass_half(server, client, answer)
            return False
        return _pass_body(server, client, answer, method, first=answer)

    def _refuse(self, client: _Wire, head: bytes, code: int) -> bool:
        if not _expects_go_ahead(head):
            _pass_request_body(client, None, head)
        reason, name = _ANSWERS[code]
        body = _SLOW_DOWN % name
        lines = [b"HTTP/1.1 %d %s" % (code, reason), b"Content-Type: application/xml"]
        lines += [b"Content-Length: %d" % len(body), b"Connection: close", b"", b""]
        is_head = head.startswith(b"HEAD ")
        client.send(b"\r\n".join(lines) + (b"" if is_head else body))
        return False


class _Wire:
    """A socket with what was read of it and not used yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._rest = sock, b""

    def head(self) -> bytes:
        """Up to and with the empty line; EOFError when there is no more."""
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, self._rest = self._rest.split(b"\r\n\r\n", 1)
        return head + b"\r\n\r\n"

    def line(self) -> bytes:
        """Up to and with the end of the line."""
        while b"\r\n" not in self._rest:
            self._more()
        line, self._rest = self._rest.split(b"\r\n", 1)
        return line + b"\r\n"

    def some(self, most: int) -> bytes:
        """At most so many bytes, at least one."""
        if not self._rest:
            self._more()
        data, self._rest = self._rest[:most], self._rest[most:]
        return data

    def _more(self) -> None:
        data = self._sock.recv(_CHUNK)
        if not data:
            raise EOFError
        self._rest += data

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


def _status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1])


def _field(head: bytes, name: str) -> str | None:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, colon, value = line.partition(":")
        if colon and key.strip().lower() == name:
            return value.strip()
    return None


def _expects_go_ahead(head: bytes) -> bool:
    return (_field(head, "expect") or "").lower() == "100-continue"


def _is_chunked(head: bytes) -> bool:
    return "chunked" in (_field(head, "transfer-encoding") or "").lower()


def _pass_request_body(source: _Wire, sink: _Wire | None, head: bytes) -> None:
    if _is_chunked(head):
        _pass_chunks(source, sink)
    else:
        _pass_exactly(source, sink, int(_field(head, "content-length") or 0))


def _pass_body(source: _Wire, sink: _Wire, head: bytes, method: str, first: bytes) -> bool:
    """The head `first`, then the answer's body; whether the connection can be used again."""
    sink.send(first)
    length = _field(head, "content-length")
    if method == "HEAD" or _status(head) in (204, 304):
        pass
    elif _is_chunked(head):
        _pass_chunks(source, sink)
    elif length is not None:
        _pass_exactly(source, sink, int(length))
    else:
        while True:  # until the server closes: ends by EOFError
            sink.send(source.some(_CHUNK))
    return (_field(head, "connection") or "").lower() != "close"


def _pass_half(source: _Wire, sink: _Wire, head: bytes) -> None:
    sink.send(head)
    if _is_chunked(head):
        size = source.line()
        sink.send(size)
        _pass_exactly(source, sink, int(size, 16) // 2)
    else:
        _pass_exactly(source, sink, int(_field(head, "content-length") or 0) // 2)


def _pass_exactly(source: _Wire, sink: _Wire | None, length: int) -> None:
    while length > 0:
        data = source.some(min(length, _CHUNK))
        length -= len(data)
        if sink is not None:
            sink.send(data)


def _pass_chunks(source: _Wire, sink: _Wire | None) -> None:
    while True:
        size = source.line()
        if sink is not None:
            sink.send(size)
        length = int(size.split(b";")[0], 16)
        _pass_exactly(source, sink, length + 2 if length else 0)
        if length == 0:
            break
    while True:
        line = source.line()
        if sink is not None:
            sink.send(line)
        if line == b"\r\n":
            return
