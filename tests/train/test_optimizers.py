"""Every optimiser against its equations; a run under each resumes bitwise and shows the weights that it should."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.train import collectives
from pipeline.train.export import whole_weights
from pipeline.train.loop import train
from pipeline.train.state import ScheduleFreeAdamW, make_optimizer
from tests.train.helpers import (
    BATCH,
    assert_equal_states,
    fake_stream,
    make_settings,
    make_task,
    new_run,
    on_ranks,
    snapshot,
)
from tests.train.test_loop import Killed, dying

BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.1


def test_schedule_free_is_algorithm_1() -> None:
    """Defazio et al. 2024, algorithm 1, written down in float64 with its own names, over a warm-up of 3 steps."""
    draws = np.random.default_rng(0)
    y = nn.Parameter(torch.tensor(draws.normal(size=(4, 3)), dtype=torch.float64))
    model = nn.Module()
    model.y = y
    optimizer = make_optimizer("schedule_free", model, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    z = x = y.detach().numpy().copy()
    v, weights = np.zeros((4, 3)), 0.0
    for t in range(1, 8):
        lr = 0.05 * min(1.0, t / 3)
        g = draws.normal(size=(4, 3))
        y_t = (1 - BETA1) * z + BETA1 * x
        np.testing.assert_allclose(y.detach().numpy(), y_t, rtol=1e-12)
        v = BETA2 * v + (1 - BETA2) * g**2
        gamma = lr * math.sqrt(1 - BETA2**t)
        z = z - gamma * g / (np.sqrt(v) + EPS) - gamma * DECAY * y_t
        weights += gamma**2
        c = gamma**2 / weights
        x = (1 - c) * x + c * z

        y.grad = torch.from_numpy(g)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        np.testing.assert_allclose(optimizer.state[y]["x"].numpy(), x, rtol=1e-12)


class Mixed(nn.Module):
    """One parameter of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(3, 4)
        self.convolution = nn.Conv2d(2, 2, 3)
        self.linear = nn.Linear(6, 4)


def test_muon_steps_matrices_by_orthogonal_ones_and_the_rest_by_adamw() -> None:
    torch.manual_seed(0)
    model, reference = Mixed(), Mixed()
    reference.load_state_dict(model.state_dict())
    muon, adamw = (
        make_optimizer(kind, m, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)
        for kind, m in (("muon", model), ("adamw", reference))
    )
    before = model.linear.weight.detach().clone()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, reference.get_parameter(name))}
    assert changed == {"linear.weight"}
    # Of the gradient U S V', the step has U V' scaled by 0.2 sqrt(max(rows, columns)); Newton-Schulz is approximate.
    assert model.linear.weight.grad is not None
    u, _, vh = torch.linalg.svd(model.linear.weight.grad, full_matrices=False)
    moved = (before - model.linear.weight.detach()) / (0.01 * 0.2 * math.sqrt(6))
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert float((moved * (u @ vh)).sum() / (moved.norm() * (u @ vh).norm())) > 0.97


def test_an_optimiser_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="there are adamw, muon and schedule_free"):
        make_optimizer("sgd", Mixed(), betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)


@pytest.mark.parametrize("optimizer", ["muon", "schedule_free"])
@pytest.mark.parametrize("kill_at", [1, 6, 13])
def test_a_run_killed_and_resumed_has_bitwise_the_same_state(optimizer: str, kill_at: int, tmp_path: Path) -> None:
    settings, task = make_settings(decay_images=0), make_task()
    state, engine, store = new_run(tmp_path / "whole", optimizer=optimizer)
    train(state, engine, task, fake_stream(), settings, store)
    final = snapshot(state)
    state, engine, store = new_run(tmp_path / "killed", optimizer=optimizer)
    with pytest.raises(Killed):
        train(state, engine, task, dying(fake_stream(), kill_at), settings, store)
    store.wait()
    state, engine, store = new_run(tmp_path / "killed", optimizer=optimizer)
    train(state, engine, task, fake_stream(), settings, store)
    assert_equal_states(snapshot(state), final)


def test_schedule_free_shows_its_average_everywhere(tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path, optimizer="schedule_free")
    followed: list[bool] = []
    state.ema.update = lambda weights, images, batch: followed.extend(  # type: ignore[method-assign]
        weights[name] is state.optimizer.state[param]["x"] for name, param in state.params.items()
    )
    train(state, engine, make_task(), fake_stream(), make_settings(decay_images=0), store)
    assert isinstance(state.optimizer, ScheduleFreeAdamW)
    assert followed
    assert all(followed)
    name, y = next(iter(state.params.items()))
    x, kept = state.optimizer.state[y]["x"], y.detach().clone()
    assert not torch.equal(x, kept)
    assert torch.equal(whole_weights(state, None)[name], x)
    assert torch.equal(state.tensors()[f"model/{name}"], x)
    with state.swapped(None):
        assert torch.equal(y, x)
    assert torch.equal(y, kept)


def _sharded(root: str, images: int, strategy: str, optimizer: str) -> None:
    state, engine, store = new_run(Path(root), strategy=strategy, optimizer=optimizer)
    ranks = collectives.rank(), collectives.world_size()
    train(state, engine, make_task(), fake_stream(*ranks), make_settings(images=images, decay_images=0), store)
    whole = snapshot(state)
    if collectives.rank() == 0:
        torch.save(whole, Path(root) / "final.pt")


@pytest.mark.slow
def test_schedule_free_is_the_same_on_shards(tmp_path: Path) -> None:
    for name, images, strategy, ranks in (("a", 12, "ddp", 1), ("b", 8, "fsdp2", 2), ("b", 12, "fsdp2", 2)):
        (tmp_path / name).mkdir(exist_ok=True)
        on_ranks(ranks, _sharded, str(tmp_path / name), images * BATCH, strategy, "schedule_free")
    whole, shards = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in "ab")
    assert whole.keys() == shards.keys()
    for key, value in whole.items():
        torch.testing.assert_close(shards[key], value, rtol=1e-3, atol=2e-5, msg=key)
