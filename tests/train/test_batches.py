"""What a step asks of its device, and batches that are there before they are asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.diffusion import rng
from pipeline.diffusion.objectives import Objective
from pipeline.model.dit import DiT
from pipeline.train import loop
from pipeline.train.loop import Engine, train
from pipeline.train.state import make_state
from pipeline.train.task import CopiedAhead, DeviceBatch, copied, stored_values
from tests.support.launches import META, Launches
from tests.train.helpers import (
    BATCH,
    TRACKS,
    FakeBatch,
    assert_equal_states,
    fake_stream,
    make_settings,
    make_task,
    new_run,
    snapshot,
)

CPU = torch.device("cpu")
ROWS = 8


class NoCheckpoints:
    def load_newest(self, *_: object, **__: object) -> None: ...
    def save(self, *_: object) -> None: ...
    def wait(self) -> None: ...


def stored_batches(_step: int) -> Iterator[FakeBatch]:
    latents = np.zeros((ROWS, 8, 8, 8), np.float16)  # posteriors: twice the channels
    text = np.zeros((ROWS, 5, 12), np.uint16), np.ones((ROWS, 5), bool)
    while True:
        yield FakeBatch(0, latents, np.zeros((ROWS, 2), np.uint64), np.zeros(ROWS, np.int64), text)


def cost(monkeypatch: pytest.MonkeyPatch, num_micro: int) -> Launches:
    """What one further step of training a small DiT costs, with everything that a batch may bring."""
    # The fused optimiser refuses `meta`; it is counted as one launch.
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
    # The pass over the generator's words is compiled on a GPU: two kernels (see tests/diffusion/test_rng.py).
    monkeypatch.setattr(rng, "_fused_words_of_blocks", two_kernels)
    counts = []
    for steps in (1, 2, 3):  # the first brings the constants
        with META:
            model = DiT(latent_channels=4, num_classes=3, text_dim=12, hidden=16, depth=1, heads=2)
        state = make_state(model, tracks=TRACKS, seed=1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
        empty = torch.zeros(1, 5, 12), torch.ones(1, 5, dtype=torch.bool)
        task = make_task(
            objective=Objective("epsilon"), mean=torch.zeros(4), std=torch.ones(4), moments=True, empty_text=empty
        )
        settings = make_settings(images=steps * ROWS, batch_size=ROWS, micro_batch=ROWS // num_micro)
        with Launches() as launches:
            train(state, Engine(model, device=META), task, stored_batches, settings, NoCheckpoints())  # type: ignore[arg-type]
        counts.append(launches)
    _, before, after = counts
    return Launches(
        after.launches - before.launches,
        after.blocking_uploads - before.blocking_uploads,
        after.uploads - before.uploads,
        after.synchronisations - before.synchronisations,
    )


def two_kernels(ids: torch.Tensor, *constants: torch.Tensor) -> list[torch.Tensor]:
    shape = (len(ids), len(constants[-1]))
    return list(torch.stack([torch.zeros(shape, dtype=torch.int64, device=ids.device)] * 4))


@pytest.mark.parametrize("num_micro", [1, 2])
def test_a_step_waits_for_its_device_once_and_for_no_copy_to_it(
    monkeypatch: pytest.MonkeyPatch, num_micro: int
) -> None:
    step = cost(monkeypatch, num_micro)
    assert dict(step.synchronisations) == {"copy to the host": 1}
    assert step.blocking_uploads == 0
    assert step.uploads == 5, "latents, ids, labels, embeddings and their mask"


@pytest.mark.parametrize("conditions", [1, 2])
def test_the_keyed_numbers_of_a_micro_batch_are_a_few_launches(
    monkeypatch: pytest.MonkeyPatch, conditions: int
) -> None:
    monkeypatch.setattr(rng, "_fused_words_of_blocks", two_kernels)
    empty = (torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)) if conditions == 2 else None
    task = make_task(mean=torch.zeros(4), std=torch.ones(4), empty_text=empty).on(META)
    latents, ids = torch.zeros(ROWS, 4, 8, 8, device=META), torch.zeros(ROWS, 2, dtype=torch.int64, device=META)
    labels = torch.zeros(ROWS, dtype=torch.int64, device=META)
    forward = lambda x, t, labels: x  # noqa: E731
    with Launches() as all_of_it:
        task.training_losses(forward, latents, ids, labels, 0)
    monkeypatch.setattr("pipeline.train.task.keyed_words_for", lambda *_, **__: WORDS)
    monkeypatch.setattr("pipeline.train.task.normal_of", lambda *_, **__: latents)
    monkeypatch.setattr("pipeline.train.task.uniform_of", lambda words: words)
    with Launches() as without:
        task.training_losses(forward, latents, ids, labels, 0)
    assert all_of_it.launches.total() - without.launches.total() <= 30


WORDS = dict.fromkeys(("noise", "time", "label", "text", "joint"), torch.zeros(ROWS, 1, device=META))


def test_stored_values_are_those_that_were_stored() -> None:
    values = torch.randn(3, 4)
    assert torch.equal(stored_values(values.half().numpy()), values.half())
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert torch.equal(stored_values(bits), values.bfloat16())


def test_the_next_batch_is_fetched_while_one_is_in_use_and_no_further() -> None:
    fetched = [threading.Event() for _ in range(5)]

    def batches() -> Iterator[FakeBatch]:
        for event, batch in zip(fetched, fake_stream()(0), strict=False):
            event.set()
            yield batch

    ahead = CopiedAhead(batches(), CPU)
    expected = fake_stream()(0)
    for at in range(3):
        batch = next(ahead)
        assert np.array_equal(batch.source.latents, next(expected).latents)
        assert torch.equal(batch.latents, torch.from_numpy(batch.source.latents))
        assert fetched[at + 1].wait(10), "the next one is on its way"
        assert not fetched[at + 2].is_set()
    ahead.close()


def test_what_fetching_raises_is_raised_where_the_batch_is_asked_for() -> None:
    def batches() -> Iterator[FakeBatch]:
        yield next(fake_stream()(0))
        raise OSError("the store is gone")

    ahead = CopiedAhead(batches(), CPU)
    next(ahead)
    with pytest.raises(OSError, match="the store is gone"):
        next(ahead)
    ahead.close()
    empty = CopiedAhead(iter(()), CPU)
    assert list(empty) == []


def test_training_on_batches_copied_ahead_ends_at_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state, engine, store = new_run(tmp_path / "asked")
    train(state, engine, make_task(), fake_stream(), make_settings(images=5 * BATCH), store)
    opened = []

    @contextmanager
    def ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Iterator[DeviceBatch]]:
        opened.append(CopiedAhead(batches, device))
        yield opened[0]
        opened[0].close()

    monkeypatch.setattr(loop, "on_device", ahead)
    other, engine, store = new_run(tmp_path / "ahead")
    train(other, engine, make_task(), fake_stream(), make_settings(images=5 * BATCH), store)
    assert opened
    assert_equal_states(snapshot(other), snapshot(state))


def test_a_batch_without_labels_or_text_has_none_on_its_device() -> None:
    batch = next(fake_stream()(0))
    assert len(copied(batch, CPU).tensors) == 3
    batch.labels = None
    assert len(copied(batch, CPU).tensors) == 2
