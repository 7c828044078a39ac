"""What the project reads back may have been changed: that is an input error which names the file, never a bug.

Each kind of file is mutated (see `mutations`) and read as jobs read it. A reader may pass over a change that does not
concern it; what it raises must have a meaning for the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConflictError, InputError
from pipeline.storage.errors import job_error
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_recipe, last_run, note_run, noted_runs
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.dedup import is_due
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import live_entries, read_entries
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins
from tests.security.mutations import mutations
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows

Read = Callable[[], Any]


def _tells(error: InputError, path: Path) -> bool:
    """Whether an error names the file, one beside it that disagrees, or the record in it; or misses all rows."""
    names = {path.name, *(other.name for other in path.parents[1].rglob("*.*"))}
    names |= {"The commit record", "has no visible row"}
    return error.rule is not None and error.next_step is not None and any(name in str(error) for name in names)


def wrongly_ended(path: Path, read: Read) -> list[str]:
    """The mutations of a file whose reading ended as a bug would, or in an error that does not name the file."""
    data, wrong = path.read_bytes(), []
    try:
        for what, changed in mutations(path, data):
            path.unlink() if changed is None else path.write_bytes(changed)
            try:
                read()
            except Exception as error:
                known = job_error(error)
                if known is None:
                    wrong.append(f"{what}: {type(error).__name__}: {error}"[:300])
                elif not isinstance(known, InputError | ConflictError):
                    wrong.append(f"{what}: exit code {known.exit_code}: {known}"[:300])
                elif isinstance(known, InputError) and not _tells(known, path):
                    wrong.append(f"{what}: says too little: {known}"[:300])
            path.write_bytes(data)
    finally:
        path.write_bytes(data)
    return wrong


# -- Datasets: the ledger, the plan, the rows ------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of two generations: a bundle, a plan of two units, rejects, notes of runs, a pin."""
    place = tmp_path_factory.mktemp("latents")
    root = planned_root(str(place), 2, 4)
    for unit in range(2):
        generation = claim(root)
        stored, rejected = latent_rows([(unit, r) for r in range(3)]), rejected_rows([(unit, 3)], "truncated")
        committer(root, generation).commit(stored, rejected, {})
        recipe = {"source": {"kind": "folder", "uri": "mem", "name": "mem"}, "image": {}, "batch_size": 4}
        note_run(root, generation.number, {"job": "encode", "handle": "key:" + "0" * 32, "recipe": recipe})
        generation.close(sealed=False)
        generation.seal()
    Pins(root, "inputs/0123456789abcdef").pin(root)
    return place


def read_dataset(place: Path) -> None:
    """What the jobs that read a dataset do, without their work."""
    root = Root(str(place))
    for pins in (None, Pins(root, "inputs/0123456789abcdef")):
        opened = LatentDataset.open(str(place), "data.uri", pins)
        _ = opened.codec, opened.latent_dtype, opened.posterior, opened.num_classes, opened.digest, opened.provenance
        _ = opened.layout_digest, opened.channel_mean, opened.has_any("caption")
        for group in opened.row_groups:
            opened.read(group.index, None)
            opened.read_fixed(group.index, "latent", verify=False)
    state = read_state(root)
    state.gaps()
    list(live_entries(state.plan))
    for unit in range(state.plan.next_unit):
        read_entries(root, state.plan.locate(unit))
    last_run(root), last_recipe(root), noted_runs(root), is_due(root, state)


def continue_dataset(place: Path) -> None:
    with claimed(Root(str(place)), "encode", patience_s=0.0):
        pass


DATASET_FILES = (
    "dataset.json",
    "plan/v*.json",
    "plan/parts/*.parquet",
    "generations/00000002/open.json",
    "generations/00000002/closed.json",
    "generations/00000002/run.json",
    "generations/00000002/heartbeat.json",
    "ledger/00000002/*.json",
    "snapshots/*.parquet",
    "data/*.parquet",
    "rejects/*.parquet",
    "inputs/*/*.json",
    "inputs/*/*.parquet",
)


@pytest.mark.parametrize("pattern", DATASET_FILES)
def test_a_dataset(dataset: Path, pattern: str) -> None:
    paths = sorted(dataset.glob(pattern))
    assert paths
    for path in paths[-2:]:
        assert wrongly_ended(path, lambda: (read_dataset(dataset), verify(str(dataset), "checksums"))) == []
