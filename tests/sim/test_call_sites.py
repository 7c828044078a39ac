"""Every place that puts, creates or deletes an object is known, and has an actor or a case that plays it."""

from __future__ import annotations

import ast
from pathlib import Path

import pipeline

PACKAGE = Path(pipeline.__file__).parent
WRITES = {"put", "put_if_absent", "delete", "upload_dir"}
# "file: function: method" -> who plays it. A new one needs an actor or a case before it is added here.
PLAYED = {
    # The store: actors of `world`, in the directed cases, the small ones and the seeds.
    "store/ledger/bundles.py: write_bundle: put_if_absent": "every claim",
    "store/ledger/generation.py: Generation._beat: put": "test_heartbeat, an advisory object",
    "store/ledger/generation.py: Generation.close: put_if_absent": "every job",
    "store/ledger/generation.py: claim_next: put_if_absent": "every job",
    "store/ledger/identity.py: claim_identity: put_if_absent": "World.encode, Samplers.sample",
    "maintenance/job.py: _note: put": "an advisory object: test_wherever_a_verification_is_killed",
    "maintenance/job.py: run_verify: put": "a report somewhere else, which nothing reads",
    "store/ledger/ledger.py: commit: put_if_absent": "World.encode, World.compact, World.dedup, Samplers.sample",
    "store/read/pins.py: Pins.pin: put_if_absent": "Trainers.train",
    "store/read/pins.py: Pins.keep: put_if_absent": "Trainers.train",
    "store/read/pins.py: Pins.withdraw: put_if_absent": "test_pinned_inputs: named by its content, only added to",
    "store/plan.py: _PartWriter._put: put_if_absent": "World.encode, Samplers.sample",
    "store/plan.py: append_version: put_if_absent": "World.encode, Samplers.sample",
    "store/ledger/generation.py: note_run: put": "an advisory object of one generation",
    "store/writer.py: write_rejects: put_if_absent": "World.encode, World.dedup",
    "store/writer.py: write_shard: put_if_absent": "World.encode, World.compact, Samplers.sample",
    "store/maintain/verify.py: collect_garbage: delete": "World.gc",
    "store/maintain/dedup.py: _Work.partitioner.partition: put_if_absent": "test_less_memory: named by its content",
    "store/maintain/forget.py: forget: put_if_absent": "test_the_list_is_kept_before_any_row_leaves: only added to",
    "maintenance/job.py: run_forget: put": "a report somewhere else, which nothing reads",
    # Exports: into a place of their own, by names that say what is in them; whoever writes one writes the same bytes.
    "maintenance/export.py: run_export: put_if_absent": "test_export_kills: what the output is, as first said",
    "maintenance/export.py: _Export.write: put": "Ray's own objects",
    "maintenance/export.py: _Export.finish: put_if_absent": "test_export_kills: what makes them one, last",
    "maintenance/shards.py: ShardWriter.write: put_if_absent": "test_export_kills: a shard, whole",
    # Sampling.
    "sample/job.py: settle_identity: put_if_absent": "Samplers.sample",
    "sample/stages.py: EncodeImages.__call__: put_if_absent": "Samplers.sample",
    "sample/stages.py: CommitImages.__call__: put_if_absent": "Samplers.sample with tars",
    "sample/output.py: show: put": "contact sheet and gallery: shown to people, read by nothing",
    "sample/regenerate.py: run: put": "one image somewhere else",
    # Training.
    "train/checkpoint.py: CheckpointStore._publish: put": "Trainers._save: shards and receipts of one start",
    "train/retention.py: begin: put_if_absent": "Trainers._work",
    "train/retention.py: mark_complete: put_if_absent": "Trainers._save",
    "train/retention.py: _remove: put_if_absent": "Trainers._save",
    "train/retention.py: _remove: delete": "Trainers._save",
    "train/control.py: request_stop: put": "a key of one start, which only asks",
    "train/control.py: record_failure: put_if_absent": "a key of one start, the first failure stays",
    "train/retention.py: History.write: put_if_absent": "Trainers._save: objects of one checkpoint",
    "train/job.py: run: put": "done.json: the result of one configuration, the same whoever reaches it",
    "train/worker.py: Reporter.show.put: put": "pictures, named by the progress: nobody reads them back",
    "train/worker.py: Quarantine._put: put": "Quarantine: a key of one start, test_quarantine",
    "train/export.py: _publish: put": "files of an export, named by its progress: the same bytes by whoever",
    "train/export.py: _publish: put_if_absent": "its marker, written last: readers look at nothing else before",
    "train/worker.py: Reporter.keep.put: put": "a grid of one count of images, a trace of one start: shown to people",
}


def found() -> set[str]:
    """All of them, as "file: function: method"."""
    sites: set[str] = set()
    for package in ("store", "maintenance", "runs", "sample", "train"):
        for path in sorted((PACKAGE / package).rglob("*.py")):
            _Finder(str(path.relative_to(PACKAGE)), sites).visit(ast.parse(path.read_text(encoding="utf-8")))
    return sites


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, sites: set[str]) -> None:
        self.file, self.sites, self.inside = file, sites, list[str]()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._enter(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._enter(node)

    def _enter(self, node: ast.ClassDef | ast.FunctionDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in WRITES:  # called here, or handed on to be called
            self.sites.add(f"{self.file}: {'.'.join(self.inside)}: {node.attr}")
        self.generic_visit(node)


def test_every_call_site_is_played() -> None:
    sites = found()
    assert sites - PLAYED.keys() == set(), "new: give it an actor or a case in tests/sim, and add it here"
    assert PLAYED.keys() - sites == set(), "gone: take it out here"
