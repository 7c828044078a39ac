"""Which tracking run wrote a dataset: one note per generation that did work."""

from __future__ import annotations

import json
from typing import Any

from pipeline.storage import Root
from pipeline.store import layout
from pipeline.store.generation import latest_number, read_closing


def note_run(root: Root, generation: int, note: dict[str, Any]) -> None:
    """Remember the run of a generation; `note` holds at least the tracker's `handle`."""
    root.put(f"{layout.generation_dir(generation)}/run.json", json.dumps(note, sort_keys=True).encode())


def last_recipe(root: Root) -> dict[str, Any]:
    """How the newest run that noted it read its source; {} when none did."""
    for number in range(latest_number(root), 0, -1):
        try:
            note = json.loads(root.read_bytes(f"{layout.generation_dir(number)}/run.json"))
        except FileNotFoundError:
            continue
        if "recipe" in note:
            return dict(note["recipe"])
    return {}


def noted_runs(root: Root) -> list[str]:
    """Every run that wrote the dataset, as id or handle, the newest first."""
    found: dict[str, None] = {}
    for number in range(latest_number(root), 0, -1):
        try:
            note = json.loads(root.read_bytes(f"{layout.generation_dir(number)}/run.json"))
        except FileNotFoundError:
            continue
        name = note.get("run_id") or note.get("handle")
        if name:
            found.setdefault(str(name))
    return list(found)


def last_run(root: Root) -> dict[str, Any]:
    """The newest note, {} when there is none; `unfinished` says that its generation never closed as done."""
    for number in range(latest_number(root), 0, -1):
        try:
            note: dict[str, Any] = json.loads(root.read_bytes(f"{layout.generation_dir(number)}/run.json"))
        except FileNotFoundError:
            continue
        closing = read_closing(root, number)
        return {**note, "generation": number, "unfinished": closing is None or closing.get("status") != "done"}
    return {}
