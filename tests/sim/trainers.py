"""Training drivers and their workers on the simulated store: pins, claims, checkpoints, history; no tensors.

What a step makes of the weights is a function of the inputs and of the step, so a checkpoint tells whose it is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from pipeline.errors import ConflictError
from pipeline.model.checkpoints import Complete, list_complete
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import is_superseded
from pipeline.store.ledger.ledger import claimed
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins
from pipeline.train.control import listed_checkpoints
from pipeline.train.retention import (
    COUNT,
    History,
    WorkerStart,
    begin,
    counting,
    mark_complete,
    newest_start,
    prune,
    read_records,
)
from tests.sim.world import World

SHARDS = ("shard-00001-model-00001-of-00002.safetensors", "shard-00001-model-00002-of-00002.safetensors")
STEPS = 8


@dataclass
class Trainers:
    """Drivers that train into one place from the dataset of a world."""

    world: World
    root: Root = field(default_factory=lambda: Root("sim://run"))
    keep_last: int = 1

    @property
    def checkpoints(self) -> Root:
        """Where they lie."""
        return self.root.child("checkpoints")

    def train(self, attempts: int = 1, steps: int = STEPS) -> str:
        """One start of the job, whose workers are started some times; "done" or "stopped"."""
        with claimed(self.root, "train", note=self._listed, patience_s=0.0) as generation:
            complete = counting(self.checkpoints, newest_start(self.checkpoints))
            complete = [c for c in complete if c.name in generation.claim["checkpoints"]]
            inputs = complete[-1].meta["inputs"] if complete else f"{len(self.world.sim.actors):016x}"
            pins = Pins(self.root, f"inputs/{inputs}")
            if not pins.holds(self.world.root):
                pins.pin(self.world.root)
            LatentDataset.open(self.world.root.uri, pins=pins).publish(pins)
            status = "stopped"
            for attempt in range(attempts):
                last = STEPS if attempt == attempts - 1 else steps // 2
                status = self._work(generation.number, inputs, pins, last)
            return status

    def _listed(self) -> dict[str, list[str]]:
        return {"checkpoints": [c.name for c in counting(self.checkpoints, newest_start(self.checkpoints))]}

    def _work(self, generation: int, inputs: str, pins: Pins, last: int) -> str:
        start = begin(self.checkpoints, generation, listed_checkpoints(self.root, generation))
        state = pins.state(self.world.root)
        assert state is not None
        assert LatentDataset.open(self.world.root.uri, pins=pins).num_rows == state.num_stored
        rows = hashlib.sha256(repr(state.stored.triples()).encode()).hexdigest()
        history = History(self.root, segment_records=3)
        step = resumed = self._load(start, inputs, rows, history)
        while step < last:
            step += 1
            history.append({"step": step, "images": step})
            superseded = is_superseded(self.root, generation)
            if superseded or step % 2 == 0 or step == last:
                self._save(start, step, resumed, inputs, rows, history)
            if superseded:
                return "stopped"
        return "done"

    def _load(self, start: WorkerStart, inputs: str, rows: str, history: History) -> int:
        for c in reversed(counting(self.checkpoints, start)):
            if self._problem(c) is None:
                assert (c.meta["inputs"], c.meta["rows"]) == (inputs, rows), "V12: a checkpoint of other inputs"
                history.go_on(c.name, c.marker)
                return c.images
        if set(start.began_with) - {c.name for c in list_complete(self.checkpoints)}:
            raise ConflictError("gone meanwhile")
        return 0

    def _problem(self, complete: Complete) -> str | None:
        for name, recorded in complete.marker["files"].items():
            try:
                data = self.checkpoints.read_bytes(f"{complete.name}/{name}")
            except FileNotFoundError:
                return f"{name} is gone"
            if hashlib.sha256(data).hexdigest() != recorded["sha256"]:
                return f"{name} is another one"
        return None

    def _save(self, start: WorkerStart, step: int, resumed: int, inputs: str, rows: str, history: History) -> None:
        name = start.name(step, "00000000")
        files = {}
        for shard in SHARDS:
            data = f"{inputs} {rows} {step} {shard}".encode()
            files[shard] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self.checkpoints.put(f"{name}/{shard}", data)
        meta = {"images": step, "inputs": inputs, "rows": rows}
        objects, count = history.cut(name)
        history.write(objects)
        marker = {"meta": meta, "files": files, "resumed": resumed, COUNT: count}
        mark_complete(self.checkpoints, name, json.dumps(marker).encode())
        prune(
            self.checkpoints,
            start,
            keep_last=self.keep_last,
            keep_every_images=None,
            superseded=lambda: is_superseded(self.root, start.generation),
        )

    def check(self) -> None:
        """I10: each marker has its shards; the history is that of one run, whole, up to the newest."""
        for complete in list_complete(self.checkpoints):
            assert self._problem(complete) is None, f"I10: {complete.name}: {self._problem(complete)}"
        steps = [record["step"] for record in read_records(self.root)]
        counted = counting(self.checkpoints, newest_start(self.checkpoints))
        assert steps == list(range(1, (counted[-1].images if counted else 0) + 1)), f"I10: the history tells {steps}"
