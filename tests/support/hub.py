"""A hub of models and datasets on loopback: what huggingface_hub asks of one to list and read a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories as folders: "models/you/net" or "datasets/you/pictures", each with one commit and names of it."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.names: dict[str, str] = {}  # of a repository: a branch or tag, which may move
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                url = urlsplit(self.path)
                parts = [unquote(part) for part in url.path.strip("/").split("/")]
                if parts[0] == "api" and len(parts) < 6:  # no question about a repository
                    self._send(404, b"{}")
                    return
                if parts[0] == "api":
                    kind, repo, verb, revision = parts[1], "/".join(parts[2:4]), parts[4], parts[5]
                    body = hub.answer(f"{kind}/{repo}", verb, revision, "/".join(parts[6:]), parse_qs(url.query))
                    known = f"{kind}/{repo}" in hub.folders
                    code = {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}
                    self._send(404 if body is None else 200, json.dumps(body or {}).encode(), {} if body else code)
                    return
                at = parts.index("resolve")
                repo = "/".join(parts[:at])
                self._file(repo if at == 3 else f"models/{repo}", parts[at + 1], "/".join(parts[at + 2 :]))

            do_HEAD = do_GET

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                asked = parse_qs(self.rfile.read(length).decode())
                parts = [unquote(part) for part in self.path.strip("/").split("/")]
                repo, revision = "/".join(parts[1:4]), parts[5]
                found = [one for one in hub.listed(repo, revision, "", True) or () if one["path"] in asked["paths"]]
                self._send(200, json.dumps(found).encode())

            def _file(self, repo: str, revision: str, name: str) -> None:
                path = hub.folders.get(repo, Path("/nowhere")) / name
                commit = hub.commit(repo, revision)
                if commit is None or not path.is_file():
                    code = "RevisionNotFound" if commit is None else "EntryNotFound"
                    self._send(404, b"", {"X-Error-Code": code})
                    return
                data = path.read_bytes()
                headers = {"X-Repo-Commit": commit, "ETag": f'"{blob(data)}"', "Accept-Ranges": "bytes"}
                span = self.headers.get("Range")
                if span is None:
                    self._send(200, data, headers)
                    return
                first, _, last = span.removeprefix("bytes=").partition("-")
                part = data[int(first) : int(last) + 1 if last else None]
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
                self._send(206, part, headers)

            def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repo: str, folder: Path, name: str = "main") -> str:
        """Serve a folder as a repository; its commit."""
        self.folders[repo], self.names[repo] = folder, name
        return self._commit(repo)

    def _commit(self, repo: str) -> str:
        return hashlib.sha1(f"{repo} {self.folders[repo]}".encode()).hexdigest()

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit that a revision means."""
        if repo not in self.folders:
            return None
        commit = self._commit(repo)
        return commit if revision in (commit, self.names[repo]) else None

    def listed(self, repo: str, revision: str, below: str, recursive: bool) -> list[dict[str, Any]] | None:
        """What the hub tells of the files, and of one level the folders, below a path."""
        if self.commit(repo, revision) is None:
            return None
        folder = self.folders[repo]
        found = sorted((folder / below).rglob("*") if recursive else (folder / below).glob("*"))
        return [
            {"type": "directory", "path": str(p.relative_to(folder)), "size": 0, "oid": "0" * 40}
            if p.is_dir()
            else {
                "type": "file",
                "path": str(p.relative_to(folder)),
                "size": p.stat().st_size,
                "oid": blob(p.read_bytes()),
            }
            for p in found
        ]

    def answer(self, repo: str, verb: str, revision: str, below: str, query: dict[str, list[str]]) -> Any:
        """The body for a question about a repository; None where there is no such thing."""
        if verb == "tree":
            return self.listed(repo, revision, below, query.get("recursive", [""])[0].lower() == "true")
        commit = self.commit(repo, revision)
        if commit is None:
            return None
        files = [
            {"rfilename": one["path"]} for one in self.listed(repo, revision, "", True) or () if one["type"] == "file"
        ]
        return {
            "id": repo.partition("/")[2],
            "sha": commit,
            "siblings": files,
            "tags": [],
            "downloads": 0,
            "private": False,
        }


def blob(data: bytes) -> str:
    """The name of content, as git has it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def served_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()
