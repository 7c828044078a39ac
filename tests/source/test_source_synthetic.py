"""The shapes: keyed by (seed, index), written once, readable as an image folder."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest

from jobs.quickstart import CLASS_NAMES, draw_shape, write_shapes
from pipeline.errors import ConflictError
from pipeline.source.config import FolderSource
from pipeline.source.reading.listing import list_entries


def test_a_folder_of_shapes_lists_with_labels_and_captions(tmp_path):
    report = write_shapes(str(tmp_path), count=26, seed=3)
    assert (report.images, report.written, report.skipped) == (26, 26, False)
    entries = list(list_entries(FolderSource(uri=str(tmp_path))))
    assert len(entries) == 26
    for index, entry in enumerate(entries):
        meta = json.loads(entry.meta)
        assert meta["label"] == index % 12
        assert meta["caption"] == f"a {CLASS_NAMES[index % 12]}"


def test_writing_again_changes_nothing_and_an_interrupted_call_is_completed(tmp_path):
    write_shapes(str(tmp_path), count=14)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()}
    assert write_shapes(str(tmp_path), count=14).skipped
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    (tmp_path / ".shapes.json").unlink()
    os.truncate(tmp_path / "images/000/000003.png", 20)
    assert not write_shapes(str(tmp_path), count=14).skipped
    assert {p: p.read_bytes() for p in before} == {p: content for p, (_, content) in before.items()}


def test_other_parameters_are_a_conflict(tmp_path):
    write_shapes(str(tmp_path), count=3)
    with pytest.raises(ConflictError, match="holds shapes made with"):
        write_shapes(str(tmp_path), count=4)


def test_shapes_go_to_any_store_and_progress_is_told():
    done = []
    report = write_shapes("memory://shapes-store", count=20, progress=done.append)
    assert report.written == 20
    assert done[-1] == 20
    assert len(list(list_entries(FolderSource(uri="memory://shapes-store")))) == 20


def test_a_picture_depends_on_seed_and_index_alone():
    assert np.array_equal(draw_shape(1, 5, 32), draw_shape(1, 5, 32))
    assert not np.array_equal(draw_shape(1, 5, 32), draw_shape(2, 5, 32))
    assert draw_shape(1, 5, 48).shape == (48, 48, 3)
    # Pinned: a change of these bytes changes everybody's quickstart.
    pictures = b"".join(draw_shape(0, i, 32).tobytes() for i in range(12))
    assert hashlib.sha256(pictures).hexdigest()[:16] == "feda9db0d3738ce9"


def test_colours_and_shapes_can_be_told_apart():
    for index in range(60):
        picture = draw_shape(0, index, 32).astype(int)
        color = index % 12 % 3
        others = [c for c in range(3) if c != color]
        excess = picture[..., color] - picture[..., others].max(axis=2)
        share = (excess > 40).mean()
        assert 0.02 < share < 0.6, (index, share)
