"""Objects of web servers that nobody here runs: how much is read of them, for how long, and where a request may lead.

Bodies are streamed and cut where enough has come, whatever the server says of their length or makes of a range; every
read has a limit of time that its length decides. A redirect is followed below the root that was asked for and nowhere
else. Names that resolve to addresses which are not public are refused, but for hosts that a person names in
LATENTLOOM_PRIVATE_HOSTS; an address written as a number in the root's own URI was named by whoever wrote it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from yarl import URL

from pipeline.storage.errors import PlaceRefused
from pipeline.storage.stores import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, SLOWEST_BYTES_PER_S

PRIVATE_HOSTS = "LATENTLOOM_PRIVATE_HOSTS"  # names, with commas between
_REDIRECTS, _MAX_REDIRECTS = (301, 302, 303, 307, 308), 5
_RANGE_BEYOND_END = 416
_CHUNK = 1 << 16


class _PublicResolver(AbstractResolver):
    """The system's resolver, without addresses that are not public."""

    def __init__(self) -> None:
        self._system = DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._system.resolve(host, port, family)
        if host in os.environ.get(PRIVATE_HOSTS, "").split(","):
            return found
        public = [one for one in found if ipaddress.ip_address(one["host"]).is_global]
        if not public:
            raise PlaceRefused(f"{host} has no public address; {PRIVATE_HOSTS} names hosts that need none")
        return public

    async def close(self) -> None:
        await self._system.close()


async def client(**options: Any) -> aiohttp.ClientSession:
    """The session of an fsspec file system for http."""
    limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    connector = aiohttp.TCPConnector(resolver=_PublicResolver())
    return aiohttp.ClientSession(**{"timeout": limits, "connector": connector, **options})


async def read(fs: Any, url: str, within: str, start: int, length: int) -> bytes:
    """`length` bytes from an offset, fewer at the end. within: the URI that a redirect must not leave.

    Raises PlaceRefused, FileNotFoundError, TimeoutError, and what aiohttp raises.
    """
    session: aiohttp.ClientSession = await fs.set_session()
    headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
    seconds = READ_TIMEOUT_S + length / SLOWEST_BYTES_PER_S
    timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    place = fs.encode_url(url)
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            async with session.get(place, headers=headers, timeout=timeout, allow_redirects=False) as answer:
                if answer.status in _REDIRECTS:
                    place, root = answer.url.join(URL(answer.headers.get("Location", ""))), URL(within)
                    below = place.path == root.path or place.path.startswith(root.path.rstrip("/") + "/")
                    if place.origin() != root.origin() or not below or ".." in place.path.split("/"):
                        bare = place.with_user(None), root.with_user(None)
                        raise PlaceRefused(f"a redirect to {bare[0]}, which is not below {bare[1]}")
                    continue
                if answer.status == _RANGE_BEYOND_END:
                    return b""
                fs._raise_not_found_for_status(answer, url)
                answer.raise_for_status()
                # A server that knows no ranges sends all from the beginning.
                return await _taken(answer.content, start if answer.status == 200 else 0, length)
    except aiohttp.ClientConnectorError as error:
        if isinstance(error.os_error, PlaceRefused):
            raise error.os_error from None
        raise
    raise PlaceRefused(f"{url} leads through more than {_MAX_REDIRECTS} redirects")


async def _taken(content: aiohttp.StreamReader, skip: int, length: int) -> bytes:
    out = bytearray()
    async for chunk in content.iter_chunked(_CHUNK):
        passed = min(skip, len(chunk))
        skip -= passed
        out += chunk[passed : passed + length - len(out)]
        if len(out) >= length:
            break
    return bytes(out)
