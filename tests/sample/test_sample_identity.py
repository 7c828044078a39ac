"""An output's identity: replaced while nothing is committed under it, kept for ever after."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConflictError
from pipeline.sample.job import check_identity, settle_identity
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, claim_next
from pipeline.store.ledger.identity import Identity, claim_identity, read_identity
from pipeline.store.ledger.ledger import collect, commit
from pipeline.store.ledger.record import CommitRecord
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.read.dataset import Dataset

FOUR = Identity("images", {"draw": {"batch_size": 4}}, {})
TWO = Identity("images", {"draw": {"batch_size": 2}}, {})


def claimed(root: Root) -> Generation:
    generation = claim_next(root, lambda number: collect(root, number), job="sample", patience_s=0.0)
    generation.close({"status": "ConfigError"})
    return generation


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """An output whose first run was named FOUR and ended before any commit."""
    root = Root(str(tmp_path))
    claim_identity(root, FOUR)
    claimed(root)
    return root


def test_an_empty_output_takes_other_settings(root: Root) -> None:
    check_identity(root, TWO)
    assert read_identity(root) == FOUR  # checking writes nothing
    settle_identity(root, TWO, claimed(root))
    assert read_identity(root) == TWO
    settle_identity(root, TWO, claimed(root))
    assert read_identity(root) == TWO


def test_rows_fix_the_identity_even_after_later_generations(root: Root) -> None:
    first = claimed(root)
    commit(root, CommitRecord(first.number, RowSet.from_triples([(0, 0, 1)])))
    for generation in (first, claimed(root)):
        with pytest.raises(ConflictError, match=r"draw\.batch_size: 4 there, 2 here"):
            settle_identity(root, TWO, generation)
    with pytest.raises(ConflictError, match=r"draw\.batch_size: 4 there, 2 here"):
        check_identity(root, TWO)
    check_identity(root, FOUR)
    assert read_identity(root) == FOUR


def test_what_an_older_run_commits_afterwards_stays_invisible(root: Root) -> None:
    old = claimed(root)
    settle_identity(root, TWO, claimed(root))
    with pytest.raises(ConflictError, match="taken over"):
        commit(root, CommitRecord(old.number, RowSet.from_triples([(0, 0, 1)])))
    settle_identity(root, FOUR, claimed(root))  # still empty
    with pytest.raises(ConflictError):
        settle_identity(root, TWO, old)  # fenced off: it touches nothing
    assert read_identity(root) == FOUR


def test_another_kind_of_dataset_is_never_replaced(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    claim_identity(root, Identity("latents", {}, {}))
    with pytest.raises(ConflictError, match="holds latents, and this job writes images"):
        settle_identity(root, TWO, claimed(root))


def test_what_is_settled_stays_over_later_claims_of_any_job(root: Root) -> None:
    settle_identity(root, TWO, claimed(root))
    claim_next(root, lambda number: collect(root, number), job="compact", patience_s=0.0).close({})
    assert read_identity(root) == TWO
    commit(root, CommitRecord(claimed(root).number, RowSet.from_triples([(0, 0, 1)])))
    with pytest.raises(ConflictError, match=r"draw\.batch_size: 2 there, 4 here"):
        settle_identity(root, FOUR, claimed(root))
    assert Dataset.open_kind(root.uri, "images").identity == TWO


def test_an_output_from_before_compilation_was_told_goes_on(root: Root) -> None:
    commit(root, CommitRecord(claimed(root).number, RowSet.from_triples([(0, 0, 1)])))
    check_identity(root, Identity("images", {"draw": {"batch_size": 4, "compile": True}}, {}))
    with pytest.raises(ConflictError, match=r"draw\.batch_size: 4 there, 2 here"):
        check_identity(root, Identity("images", {"draw": {"batch_size": 2, "compile": True}}, {}))
