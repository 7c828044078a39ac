"""Which tracking run wrote a dataset: one note per generation that did work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipeline.storage.root import Root
from pipeline.store.ledger import layout
from pipeline.store.ledger.generation import latest_number, read_closing

UPKEEP = ("compact",)  # jobs that move rows which others have made


def note_run(root: Root, generation: int, note: dict[str, Any]) -> None:
    """Remember the run of a generation; `note` holds at least the tracker's `handle`."""
    root.put(f"{layout.generation_dir(generation)}/run.json", json.dumps(note, sort_keys=True).encode())


def _notes(root: Root, upto: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(generation, note) of every generation, up to one where it is given, that left one, the newest first."""
    for number in range(latest_number(root) if upto is None else upto, 0, -1):
        try:
            yield number, json.loads(root.read_bytes(f"{layout.generation_dir(number)}/run.json"))
        except FileNotFoundError:
            continue


def last_recipe(root: Root) -> dict[str, Any]:
    """How the newest run that noted it read its source; {} when none did."""
    return next((dict(note["recipe"]) for _, note in _notes(root) if "recipe" in note), {})


def noted_runs(root: Root) -> list[str]:
    """Every run that wrote the dataset, as id or handle, the newest first."""
    names = (note.get("run_id") or note.get("handle") for _, note in _notes(root))
    return list(dict.fromkeys(str(name) for name in names if name))


def last_run(root: Root, upto: int | None = None, job: str | None = None) -> dict[str, Any]:
    """The newest note of a job, by default of any that makes rows, {} when there is none.

    upto: of this generation at most. `unfinished` says that its generation never closed as done.
    """
    for number, note in _notes(root, upto):
        # Notes of earlier releases tell no job: only those that make rows left any.
        by = note.get("job")
        if by in (job, None) or (job is None and by not in UPKEEP):
            closing = read_closing(root, number)
            return {**note, "generation": number, "unfinished": closing is None or closing.get("status") != "done"}
    return {}
