"""An average of another length, rebuilt from the checkpoints of a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.train import collectives
from pipeline.train.checkpoint import CheckpointStore, list_complete
from pipeline.train.loop import train
from pipeline.train.parallel import wrap
from pipeline.train.state import Track, make_state, read_track, rebuild
from tests.train.helpers import TinyNet, fake_stream, make_settings, make_task, on_ranks, plain

TRACKS = (Track("a", 0.05), Track("b", 0.10), Track("wanted", 0.075))


def _run(root: str, strategy: str, tracks: tuple[Track, ...] = TRACKS) -> None:
    path = Path(root)
    torch.manual_seed(5)
    model = TinyNet()
    engine = wrap(model, device=torch.device("cpu"), strategy=strategy)
    state = make_state(model, tracks=tracks, seed=11, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    store = CheckpointStore(Root(str(path / "checkpoints")), path / "staging", keep_last=100)
    stream = fake_stream(collectives.rank(), collectives.world_size())
    train(state, engine, make_task(), stream, make_settings(images=600, checkpoint_images=60), store)
    truth = {k: plain(v) for k, v in state.ema.averages[tracks[-1].name].items()}
    if collectives.rank() == 0:
        torch.save(truth, path / "truth.pt")


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert found.keys() == truth.keys()
    flat = [torch.cat([x[k].flatten() for k in sorted(truth)]) for x in (found, truth)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.integration
def test_a_length_that_was_not_tracked_is_rebuilt(tmp_path: Path) -> None:
    _run(str(tmp_path), "ddp")
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)
    root = Root(str(tmp_path / "checkpoints"))
    # The wanted track itself is in the checkpoints too: hide it, or the answer is no reconstruction.
    for complete in list_complete(root):
        marker = tmp_path / "checkpoints" / complete.name / "COMPLETE.json"
        marker.write_text(marker.read_text().replace('"sigma_rel": 0.075', '"sigma_rel": null'))
    assert distance(rebuild(root, 0.075), truth) < 0.01
    assert distance(rebuild(root, 0.12), truth) > 0.01


@pytest.mark.integration
def test_damage_and_absence_are_said(tmp_path: Path) -> None:
    _run(str(tmp_path), "ddp", (Track("h", half_life_images=50.0),))
    root = Root(str(tmp_path / "checkpoints"))
    with pytest.raises(InputError, match="holds a power-function average"):
        rebuild(root, 0.1)
    newest = list_complete(root)[-1]
    (shard,) = (tmp_path / "checkpoints" / newest.name).glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="is corrupt"):
        read_track(root, newest, "h")


@pytest.mark.slow
def test_shards_of_several_ranks_are_joined(tmp_path: Path) -> None:
    on_ranks(2, _run, str(tmp_path), "fsdp2")
    root = Root(str(tmp_path / "checkpoints"))
    found = read_track(root, list_complete(root)[-1], "wanted")
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)
    assert all(torch.equal(found[k], truth[k]) for k in truth)
