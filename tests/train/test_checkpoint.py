"""Checkpoints: complete or not there, never half; safe to read; kept as asked."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConflictError, InputError
from pipeline.storage.root import Root
from pipeline.train import checkpoint
from pipeline.train.checkpoint import MARKER, CheckpointStore, list_complete


def store(path: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(Root(str(path / "checkpoints")), path / "staging", **options)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "model/w": torch.full((3, 2), value),
        "ema/track/w": torch.full((3, 2), value, dtype=torch.float64),
        "optimizer/step/w": torch.tensor(value),
        "model/count": torch.tensor([int(value)], dtype=torch.int64),
    }


def save(path: Path, *images: int, **options: Any) -> Root:
    s = store(path, keep_last=options.pop("keep_last", 100), **options)
    for n in images:
        s.save(tensors(n), {"images": n, "note": "x"})
    s.wait()
    return s.root


def load(path: Path) -> tuple[int | None, dict[str, torch.Tensor]]:
    found = tensors(-1)
    meta = store(path).load_newest(found, lambda _meta: None)
    return (None if meta is None else meta["images"]), found


def directory(root: Root, images: int) -> Path:
    (name,) = [c.name for c in list_complete(root) if c.images == images]
    path = root.local_path(name)
    assert path is not None
    return path


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    images, found = load(tmp_path)
    assert images == 20
    for key, value in tensors(20).items():
        assert torch.equal(found[key], value)
        assert found[key].dtype == value.dtype


def test_nothing_there_loads_nothing(tmp_path: Path) -> None:
    assert load(tmp_path)[0] is None


def test_the_caller_may_change_tensors_and_meta_at_once(tmp_path: Path) -> None:
    s, values, meta = store(tmp_path), tensors(7), {"images": 7, "window": {"sums": [1.0]}}
    s.save(values, meta)
    for value in values.values():
        value.zero_()
    meta["window"]["sums"][0] = 99.0  # type: ignore[index]
    s.wait()
    images, found = load(tmp_path)
    assert images == 7
    assert torch.equal(found["model/w"], torch.full((3, 2), 7.0))
    assert list_complete(s.root)[0].meta["window"] == {"sums": [1.0]}


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    root = save(tmp_path, 10)
    names = [info.key.rpartition("/")[2] for info in root.list()]
    assert {n.rpartition(".")[2] for n in names} == {"safetensors", "json"}
    for info in root.list():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
            pickle.loads(root.read_bytes(info.key))


def test_without_its_marker_it_is_not_there(tmp_path: Path) -> None:
    root = save(tmp_path, 10, 20)
    (directory(root, 20) / MARKER).unlink()
    assert load(tmp_path)[0] == 10


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _intrude(path: Path) -> None:
    (path.parent / "shard-00099-model-00001-of-00001.safetensors").write_bytes(path.read_bytes())


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink, _intrude])
def test_a_damaged_one_is_skipped_with_a_warning_for_the_one_before(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = save(tmp_path, 10, 20)
    (shard,) = directory(root, 20).glob("*.safetensors")
    damage(shard)
    with caplog.at_level(logging.WARNING):
        images, found = load(tmp_path)
    assert images == 10
    assert torch.equal(found["model/w"], torch.full((3, 2), 10.0))
    assert "is corrupt and skipped" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", '{"meta": {}}', '{"meta": {"images": 1}, "files": {"../../x": {}}}'])
def test_a_torn_or_forged_marker_is_skipped_with_a_warning(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = save(tmp_path, 10, 20)
    (directory(root, 20) / MARKER).write_text(text)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        assert load(tmp_path)[0] == 10
    assert "is skipped" in caplog.text


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    root = save(tmp_path, *range(10, 101, 10), keep_last=2, keep_every_images=30)
    assert [c.images for c in list_complete(root)] == [30, 60, 90, 100]


def test_retention_keeps_the_last_one_before_steps_were_skipped(tmp_path: Path) -> None:
    s = store(tmp_path, keep_last=2)
    for images in range(10, 101, 10):
        s.save(tensors(images), {"images": images, "skipped_in_a_row": max(0, images - 30)})
    s.wait()
    assert [c.images for c in list_complete(s.root)] == [30, 90, 100]
    s.save(tensors(110), {"images": 110, "skipped_in_a_row": 0})
    s.wait()
    assert [c.images for c in list_complete(s.root)] == [100, 110]


def test_retention_removes_torn_ones_that_are_older_than_a_complete_one(tmp_path: Path) -> None:
    root = save(tmp_path, 10)
    (directory(root, 10) / MARKER).unlink()
    save(tmp_path, 20)
    assert [c.images for c in list_complete(root)] == [20]
    assert [i.key.partition("/")[0] for i in root.list() if i.key.endswith(".safetensors")] == [
        c.name for c in list_complete(root)
    ]


def test_what_was_removed_as_torn_does_not_become_complete(tmp_path: Path) -> None:
    """Its writer lives: a start that was superseded, or whose node was cut off."""
    slow = store(tmp_path)
    slow._collect_receipts = lambda name, world_size: (save(tmp_path, 20), {})[1]  # type: ignore[method-assign]
    slow.save(tensors(10), {"images": 10})
    with pytest.raises(ConflictError, match="was removed before it was complete"):
        slow.wait()
    assert [c.images for c in list_complete(slow.root)] == [20]


def test_a_later_start_counts_what_was_complete_when_it_began(tmp_path: Path) -> None:
    first = store(tmp_path, keep_last=1)
    first.save(tensors(10), {"images": 10})
    first.wait()
    second = store(tmp_path, keep_last=1)
    assert second.load_newest(tensors(-1), lambda _meta: None) is not None
    first.save(tensors(30), {"images": 30})  # superseded: it prunes nothing, and nobody goes on from here
    first.wait()
    assert load(tmp_path)[0] == 10
    second.save(tensors(20), {"images": 20})
    second.wait()
    assert [c.images for c in list_complete(second.root)] == [10, 30, 20]  # a third start has come since


def test_checkpoints_of_a_branch_that_was_left_are_no_milestones(tmp_path: Path) -> None:
    first = store(tmp_path, keep_last=9)
    for images in (10, 20):
        first.save(tensors(images), {"images": images})
    first.wait()
    second = store(tmp_path, keep_last=1, keep_every_images=20)
    shutil.rmtree(directory(first.root, 20))  # of the two that it began with it finds but the first
    second.load_newest(tensors(-1), lambda _meta: None)
    first.save(tensors(25), {"images": 25})
    first.wait()
    for images in (24, 30, 44):
        second.save(tensors(images), {"images": images})
    second.wait()
    assert [c.images for c in list_complete(second.root)] == [24, 44]


def test_a_start_whose_checkpoints_went_meanwhile_does_not_begin_anew(tmp_path: Path) -> None:
    root = save(tmp_path, 10)
    names = [c.name for c in list_complete(root)]
    shutil.rmtree(directory(root, 10))
    late = store(tmp_path, generation=1, listed=names)
    with pytest.raises(ConflictError, match="that this start began with are gone"):
        late.load_newest(tensors(-1), lambda _meta: None)


def test_another_attempt_never_writes_over_the_files_of_the_first(tmp_path: Path) -> None:
    root = save(tmp_path, 10)
    save(tmp_path, 10)
    assert len({c.name for c in list_complete(root)}) == 2


def test_an_upload_that_fails_is_raised_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = store(tmp_path)

    def full(_self: Root, _key: str, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Root, "put", full)
    s.save(tensors(1), {"images": 1})
    with pytest.raises(OSError, match="No space left"):
        s.wait()
    monkeypatch.undo()
    assert list_complete(s.root) == []
    s.save(tensors(2), {"images": 2})
    s.wait()
    assert load(tmp_path)[0] == 2


def test_a_rank_that_never_uploads_is_named(tmp_path: Path) -> None:
    s = store(tmp_path, receipts_timeout_s=0.05)
    with pytest.raises(InputError, match=r"rank 0 has not uploaded"):
        s._collect_receipts("000000000000001-00000000", 1)


def test_large_states_are_cut_into_files_that_one_put_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 30)
    root = save(tmp_path, 10)
    assert len(list(directory(root, 10).glob("*.safetensors"))) > 1
    assert load(tmp_path)[0] == 10


def test_any_fsspec_store_will_do(tmp_path: Path) -> None:
    root = Root("memory://checkpoint-test/checkpoints")
    s = CheckpointStore(root, tmp_path / "staging")
    s.save(tensors(5), {"images": 5})
    s.wait()
    found = tensors(0)
    meta = CheckpointStore(root, tmp_path / "other").load_newest(found, lambda _meta: None)
    assert meta is not None
    assert torch.equal(found["model/w"], torch.full((3, 2), 5.0))
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_the_marker_is_the_last_object_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    original = Root.put

    def note(root: Root, key: str) -> None:
        if str(tmp_path) in root.uri_of(key):  # a run that another test left may still beat
            order.append(key.rpartition("/")[2])

    def noted(self: Root, key: str, data: bytes) -> None:
        note(self, key)
        original(self, key, data)

    create = Root.put_if_absent

    def noted_too(self: Root, key: str, data: bytes) -> bool:
        note(self, key)
        return create(self, key, data)

    monkeypatch.setattr(Root, "put", noted)
    monkeypatch.setattr(Root, "put_if_absent", noted_too)
    root = save(tmp_path, 10)
    assert order[-1] == MARKER
    recorded = json.loads((directory(root, 10) / MARKER).read_text())["files"]
    assert set(recorded) == {n for n in order if n.endswith(".safetensors")}
