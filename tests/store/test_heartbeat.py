"""The sign of life of a run: it goes on while only listings fail, and notices a newer run as soon as they work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import ConflictError
from pipeline.storage.root import Root
from pipeline.store.ledger import generation as module
from pipeline.store.ledger.generation import Generation
from tests.support.rows import claim, planned_root


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)


def count(root: Root, number: int) -> int:
    try:
        return int(json.loads(root.read_bytes(f"generations/{number:08d}/heartbeat.json"))["count"])
    except FileNotFoundError:
        return 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_goes_on_while_listings_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = planned_root(str(tmp_path), units=1, rows=1)
    generation = claim(root)
    generation.abandon()

    def refuse(self: Root, prefix: str = "") -> list[str]:
        raise OSError(5, "no listing")

    with monkeypatch.context() as patch:
        patch.setattr(Root, "list_dirs", refuse)
        beating = Generation(root, generation.number, [])
        before = count(root, generation.number)
        beating.start_heartbeat()
        until(lambda: count(root, generation.number) > before + 3)
    claim(root).abandon()

    def noticed() -> bool:
        try:
            beating.check()
        except ConflictError:
            return True
        return False

    until(noticed)
    beating.abandon()
