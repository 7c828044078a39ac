"""Sampling runs on the simulated store: claim, identity, requests, images as files or in tars, commits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.sample.job import settle_identity
from pipeline.sample.output import IMAGES, file_key
from pipeline.sample.plan import RequestEntry
from pipeline.sample.stages import pack_units
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.layout import IDENTITY
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import append_version, read_entries, work_of
from pipeline.store.read.dataset import Dataset
from pipeline.store.schema import REJECTS
from pipeline.store.writer import Committer
from tests.sim.world import World

REQUESTS = ("00", "01", "02")


@dataclass
class Samplers:
    """Runs that draw the same requests into one place, each with its settings and on its device."""

    world: World
    root: Root
    drawn: dict[bytes, str] = field(default_factory=dict)  # sha256 of an image -> under which settings

    def identity(self, settings: str) -> Identity:
        """What makes images of some settings."""
        return Identity("images", {"draw": settings}, {})

    def claim_only(self, settings: str) -> None:
        """A run that fails before it has drawn anything."""
        claim_identity(self.root, self.identity(settings))
        with claimed(self.root, "sample", patience_s=0.0) as generation:
            generation.summary["status"] = "ConfigError"

    def sample(self, settings: str, *, device: str = "one", tars: bool = False) -> None:
        """The sample job: what is asked for and not there yet."""
        if not self.root.exists(IDENTITY):
            claim_identity(self.root, self.identity(settings))
        with claimed(self.root, "sample", patience_s=0.0) as generation:
            settle_identity(self.root, self.identity(settings), generation)
            plan = read_state(self.root).plan
            if not plan.versions:
                units = [[RequestEntry(name, "{}") for name in REQUESTS]]
                append_version(plan, units, source={}, generation=generation.number)
            state = read_state(self.root)
            committer = Committer(self.root, generation.number, 1 << 20, None, {})
            for work in (work for works in work_of(state.gaps(), 100) for work in works):
                entries = read_entries(self.root, state.plan.locate(work.unit))
                open_rows = [e for e in entries if any(a <= e.first_row < (b or 9) for a, b in work.ranges)]
                rows = [self._row(settings, device, e.unit, e.first_row, e.key, tars) for e in open_rows]
                table = pa.Table.from_pylist(rows, schema=IMAGES)
                if tars:
                    table = pack_units(table, self.root.put_if_absent)
                committer.commit(table, REJECTS.empty_table(), {})

    def check(self) -> None:
        """Every visible image is there, whole, and of the settings that the dataset says."""
        assert not [p for p in verify(self.root.uri, "checksums").problems if p["kind"] != "unfinished"]
        dataset = Dataset.open_kind(self.root.uri, "images")
        settings = dataset.fingerprint["draw"]
        for group in dataset.row_groups:
            for row in dataset.read(group.index, ["content_sha256"]).to_pylist():
                assert self.drawn[row["content_sha256"]] == settings, "V5: an image of other settings is visible"

    def _row(self, settings: str, device: str, unit: int, row: int, name: str, tars: bool) -> dict[str, object]:
        data = f"{settings} {device} {name}".encode()
        digest = hashlib.sha256(data).digest()
        self.drawn[digest] = settings
        file = None
        if not tars:
            file = file_key(name, "png", data)
            self.root.put_if_absent(file, data)
        return {
            **dict.fromkeys(IMAGES.names),
            "sample_id": bytes.fromhex(name * 16),
            "key": name,
            "unit": unit,
            "row": row,
            "variant": 0,
            "bucket": "8x8",
            "image": data if tars else b"",
            "file": file,
            "media_type": "image/png",
            "content_sha256": digest,
            **dict.fromkeys(("height", "width", "steps", "seed", "run_seed"), 8),
            "guidance": 1.0,
            **dict.fromkeys(("sampler", "model_digest", "codec_sha256", "provenance"), "x"),
        }
