"""Where a path or URI points, at the root of a store, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage.root import place_of


@pytest.mark.parametrize(
    ("uri", "root", "name"),
    [
        ("/x.png", "/", "x.png"),
        ("/a/b/x.png", "/a/b", "x.png"),
        ("file:///x.png", "/", "x.png"),
        ("file:///a/x.png", "/a", "x.png"),
        ("memory://x.png", "memory://", "x.png"),
        ("memory:///x.png", "memory://", "x.png"),
        ("s3://bucket/x.png", "s3://bucket", "x.png"),
        ("s3://bucket/a/x.png", "s3://bucket/a", "x.png"),
    ],
)
def test_an_object_has_a_root_and_a_key(uri: str, root: str, name: str) -> None:
    found, key = place_of(uri)
    assert (found.uri, key) == (root, name)


def test_a_bare_name_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"data")
    root, key = place_of("x.png")
    assert root.read_bytes(key) == b"data"
    again, name = place_of(str(tmp_path / "x.png"))
    assert again.read_bytes(name) == b"data"
