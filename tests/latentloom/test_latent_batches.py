"""Batches for a training loop: the order and the numbers of jobs.train, resumed at any step, under any loader."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import latentloom as ll
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.config import load_config
from pipeline.diffusion.rng import ids_from_words
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.train.checks import Facts
from pipeline.train.config import TrainJobConfig
from pipeline.train.inputs import Served, make_task
from pipeline.train.task import stored_values
from tests.train.dataset import grow_dataset, make_dataset

ROWS, BATCH = 90, 8
STEPS = ROWS // BATCH


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data") / "latents", rows=ROWS, captions=("a", "b"))


def ids(batch: dict[str, Any]) -> list[tuple[int, int]]:
    return [tuple(words) for words in batch["ids"].tolist()]


def flat(batches: Any) -> list[tuple[int, int]]:
    return [name for batch in batches for name in ids(batch)]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


def test_a_batch_is_tensors_with_their_place(uri: str) -> None:
    batch = next(iter(ll.open_latents(uri).stream(batch_size=BATCH, captions=True)))
    assert (batch["latents"].dtype, tuple(batch["latents"].shape)) == (torch.float32, (BATCH, 4, 8, 8))
    assert (batch["labels"].dtype, tuple(batch["ids"].shape)) == (torch.int64, (BATCH, 2))
    assert (batch["step"], batch["epoch"], batch["bucket"]) == (0, 0, "32x32")
    assert set(batch["captions"]) == {"a", "b"}


def test_an_iteration_is_one_epoch_and_the_next_one_the_next(uri: str) -> None:
    batches = ll.open_latents(uri).stream(batch_size=BATCH, seed=3)
    assert len(batches) == STEPS
    assert batches.left_out == {"32x32": ROWS - STEPS * BATCH}
    epochs = [list(batches) for _ in range(2)]
    for number, epoch in enumerate(epochs):
        assert [batch["epoch"] for batch in epoch] == [number] * STEPS
        assert len(set(flat(epoch))) == STEPS * BATCH
    assert flat(epochs[0]) != flat(epochs[1])
    batches.set_epoch(1)
    assert flat(batches) == flat(epochs[1])
    with pytest.raises(ValueError, match="at least 0"):
        batches.set_epoch(-1)


def test_the_order_is_that_of_the_training(uri: str) -> None:
    own = ll.open_latents(uri).stream(batch_size=BATCH, seed=3, holdout=0.2)
    theirs = LatentStream(LatentDataset.open(uri), seed=3, batch_size=BATCH, holdout=0.2)
    two_epochs = [batch for _ in range(2) for batch in own]
    expected = [ids_from_words(batch.sample_ids) for batch in islice(theirs, 2 * len(own))]
    theirs.close()
    assert all(torch.equal(batch["ids"], other) for batch, other in zip(two_epochs, expected, strict=True))


@pytest.mark.parametrize("posterior", ["mode", "moments"])
def test_the_numbers_are_those_that_the_training_learns_from(tmp_path: Path, posterior: str) -> None:
    made = make_dataset(tmp_path / "latents", posterior=posterior)
    settings = ["data.uri=x", "output.uri=y", "train.images=8", "train.seed=5", "model.kind=dit"]
    config = load_config(TrainJobConfig, [], [*settings, f"train.batch_size={BATCH}"])
    dataset = LatentDataset.open(made)
    task = make_task(config, [Served(dataset)], Facts(4, 4, 3, posterior == "moments", ("32x32",), None))
    own = ll.open_latents(made).stream(batch_size=BATCH, seed=5)
    theirs = LatentStream(dataset, seed=5, batch_size=BATCH)
    for _ in range(2):
        for batch, other in zip(own, theirs.batches_from(batch_of(own)), strict=False):
            raw, names = stored_values(other.latents).float(), ids_from_words(other.sample_ids)
            assert torch.equal(batch["latents"], task.clean(raw, names, other.epoch))
    theirs.close()
    raw = next(iter(ll.open_latents(made).stream(batch_size=BATCH, seed=5, normalised=False)))["latents"]
    assert raw.shape[1] == (8 if posterior == "moments" else 4)


def batch_of(batches: ll.LatentBatches) -> int:
    return int(batches.state_dict()["step"])


def test_ranks_share_each_batch(uri: str) -> None:
    latents = ll.open_latents(uri)
    whole = list(latents.stream(batch_size=BATCH, seed=1))
    ranks = [list(latents.stream(batch_size=BATCH, seed=1, rank=rank, world=4)) for rank in range(4)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert ids(batch) == flat(parts)


def test_every_state_goes_on_exactly_there(uri: str) -> None:
    latents = ll.open_latents(uri)
    expected = list(latents.stream(batch_size=BATCH, seed=2))
    for taken in range(STEPS):
        first = latents.stream(batch_size=BATCH, seed=2)
        running = iter(first)
        for _ in range(taken):
            next(running)
        state = first.state_dict()
        running.close()
        again = latents.stream(batch_size=BATCH, seed=2)
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == STEPS - taken
        assert all(same(one, other) for one, other in zip(rest, expected[taken:], strict=True))


def test_a_state_serves_another_number_of_ranks(uri: str) -> None:
    latents = ll.open_latents(uri)
    whole = latents.stream(batch_size=BATCH)
    running = iter(whole)
    next(running)
    state = whole.state_dict()
    half = latents.stream(batch_size=BATCH, rank=1, world=2)
    half.load_state_dict(state)
    assert ids(next(iter(half))) == ids(next(running))[BATCH // 2 :]
    running.close()


def test_a_state_of_another_stream_is_refused(uri: str) -> None:
    latents = ll.open_latents(uri)
    state = latents.stream(batch_size=BATCH, seed=1).state_dict()
    with pytest.raises(ll.ConflictError, match="seed: 1 in the state, 2 now"):
        latents.stream(batch_size=BATCH, seed=2).load_state_dict(state)


def test_a_batch_larger_than_the_rows_is_refused(uri: str) -> None:
    with pytest.raises(ll.ConfigError, match="do not fill a single batch") as caught:
        ll.open_latents(uri).stream(batch_size=2048)
    assert (caught.value.key, caught.value.value) == ("batch_size", 2048)
    assert f"the largest here holds {ROWS}" in str(caught.value.rule)
    assert caught.value.next_step


def test_numbers_that_do_not_fit_name_the_argument(uri: str) -> None:
    latents = ll.open_latents(uri)
    with pytest.raises(ll.ConfigError) as caught:
        latents.stream(batch_size=BATCH, world=3)
    assert caught.value.key == "world"
    with pytest.raises(ll.ConfigError) as caught:
        latents.stream(batch_size=BATCH + 1)
    assert caught.value.key == "lanes"


# -- Loaders ---------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_loader_gives_the_same_batches_in_the_same_order(uri: str, workers: int) -> None:
    latents = ll.open_latents(uri)
    plain = latents.stream(batch_size=BATCH, seed=4)
    expected = [list(plain) for _ in range(2)]
    own = latents.stream(batch_size=BATCH, seed=4)
    loader = DataLoader(own, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    assert len(loader) == STEPS
    for epoch in expected:
        assert all(same(one, other) for one, other in zip(loader, epoch, strict=True))


@pytest.mark.integration
def test_workers_of_one_epoch_are_told_which(uri: str) -> None:
    latents = ll.open_latents(uri)
    own = latents.stream(batch_size=BATCH, rank=1, world=2)
    loader = DataLoader(own, batch_size=None, num_workers=2)
    plain = latents.stream(batch_size=BATCH, rank=1, world=2)
    for epoch in range(2):
        own.set_epoch(epoch)
        assert flat(loader) == flat(plain)


@pytest.mark.integration
def test_workers_that_are_no_forks_read_the_same_state(uri: str, tmp_path: Path) -> None:
    made = make_dataset(tmp_path / "latents", rows=ROWS)
    own = ll.open_latents(made).stream(batch_size=BATCH)
    next(iter(own))
    again = pickle.loads(pickle.dumps(own))
    assert again.state_dict() == own.state_dict()
    assert flat(again) == flat(own)
    kept = pickle.dumps(own)
    grow_dataset(made)
    with pytest.raises(ll.ConflictError, match="has changed since it was opened"):
        pickle.loads(kept)


def test_the_state_of_a_worker_is_refused_by_another_number_of_them(uri: str) -> None:
    own = ll.open_latents(uri).stream(batch_size=BATCH)
    own.load_state_dict(own.state_dict() | {"worker": [1, 2, 0]})
    with pytest.raises(ll.ConflictError, match="another number of DataLoader workers") as caught:
        next(iter(own))
    assert caught.value.key == "num_workers"


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore")
def test_torchdata_resumes_at_every_step(uri: str, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    latents = ll.open_latents(uri)

    def loader() -> Any:
        own = latents.stream(batch_size=BATCH, seed=6)
        return stateful.StatefulDataLoader(own, batch_size=None, num_workers=workers)

    expected = flat(latents.stream(batch_size=BATCH, seed=6))
    for taken in range(0, STEPS, 1 if workers == 0 else 3):
        first = loader()
        running: Iterator[Any] = iter(first)
        begun = [next(running) for _ in range(taken)]
        state = first.state_dict()
        again = loader()
        again.load_state_dict(state)
        assert flat(begun) + flat(again) == expected
        del running, first, again


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_accelerate_leaves_the_batches_as_they_are(uri: str) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    latents = ll.open_latents(uri)
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(latents.stream(batch_size=BATCH), batch_size=None))
    assert flat(loader) == flat(latents.stream(batch_size=BATCH))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_on_it(uri: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    seen: list[int] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Conv2d(4, 4, 1)

        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            seen.append(batch["step"])
            return self.net(batch["latents"]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batches = ll.open_latents(uri).stream(batch_size=BATCH)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.fit(Module(), DataLoader(batches, batch_size=None))
    assert seen == list(range(2 * STEPS))
