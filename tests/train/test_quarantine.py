"""Samples of skipped steps can be read by anybody, and a repeated step is not there twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.storage.root import Root
from pipeline.train.worker import QUARANTINE, Quarantine, read_quarantine


def skipped(step: int) -> dict[str, Any]:
    ids = [f"{step:02x}{at:02x}" + "00" * 14 for at in range(3)]
    return {"step": step, "images": 4 * step + 4, "loss": float("nan"), "grad_norm": 2.0e5, "sample_ids": ids}


def test_rows_are_one_for_each_sample_and_step(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    assert len(read_quarantine(root)) == 0
    quarantine = Quarantine(root)
    quarantine.add(skipped(3))
    quarantine.add(skipped(7))
    table = pq.read_table(tmp_path / QUARANTINE / "000000.parquet")
    assert table["step"].to_pylist() == [3, 3, 3, 7, 7, 7]
    assert table["sample_id"].to_pylist()[4] == bytes([7, 1]) + bytes(14)
    assert table["grad_norm"].to_pylist()[0] == 2.0e5
    assert table["loss"].null_count == 0


def test_a_resume_forgets_the_steps_it_repeats(tmp_path: Path) -> None:
    first = Quarantine(Root(str(tmp_path)), 1)
    for step in (3, 7, 8):
        first.add(skipped(step))
    again = Quarantine(Root(str(tmp_path)), 2)
    again.rewind(7)  # seven steps are done: step 7, counted from 0, is the next
    again.add(skipped(7))
    assert sorted(set(read_quarantine(Root(str(tmp_path)))["step"].to_pylist())) == [3, 7]
    assert len(read_quarantine(Root(str(tmp_path)))) == 6
    first.add(skipped(9))  # it was superseded, and has not noticed yet
    assert sorted(set(read_quarantine(Root(str(tmp_path)))["step"].to_pylist())) == [3, 7]
