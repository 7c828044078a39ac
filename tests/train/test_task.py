"""One batch's loss: keyed draws, normalisation, label dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.rng import ids_from_words, keyed_normal, keyed_uniform
from pipeline.diffusion.solvers import combination_shares
from pipeline.train.task import Task
from tests.train.helpers import CHANNELS, make_task, samples


def batch(count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    latents, ids, labels = samples()
    return torch.from_numpy(latents[:count]), ids_from_words(ids[:count]), torch.from_numpy(labels[:count])


def zero(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


def test_a_samples_loss_depends_on_its_id_and_epoch_only() -> None:
    task, (latents, ids, labels) = make_task(), batch()
    together, t = task.training_losses(zero, latents, ids, labels, epoch=2)
    alone, t_alone = task.training_losses(zero, latents[3:4], ids[3:4], labels[3:4], epoch=2)
    assert torch.equal(together[3:4], alone)
    assert torch.equal(t[3:4], t_alone)
    later, _ = task.training_losses(zero, latents, ids, labels, epoch=3)
    assert not torch.equal(together, later)


def test_the_flow_loss_of_a_zero_prediction_is_the_targets_mean_square() -> None:
    task, (latents, ids, labels) = make_task(), batch()
    x0 = task.clean(latents, ids, 0)
    noise, t = torch.randn_like(x0), torch.full((len(x0),), 0.3)
    expected = (noise - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(task.losses(zero, x0, noise, t, labels), expected)


def test_latents_are_normalised_by_channel() -> None:
    task, (_, ids, _) = make_task(), batch()
    assert torch.equal(task.clean(torch.ones(1, 2, 4, 4), ids[:1], 0), torch.zeros(1, 2, 4, 4))


def test_stored_posteriors_are_drawn_anew_in_each_epoch() -> None:
    task, (latents, ids, _) = make_task(moments=True), batch()
    stored = torch.cat([latents, torch.full_like(latents, -4.0)], dim=1)
    first, again, later = (task.clean(stored, ids, epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    spread = (first - task.clean(torch.cat([latents, torch.full_like(latents, -99.0)], 1), ids, 0)).std() * 3.0
    assert float(spread) == pytest.approx(0.1353, rel=0.2)  # exp(-4 / 2)


def test_a_share_of_labels_is_dropped_by_id() -> None:
    task = make_task(label_dropout=0.25)
    ids = torch.arange(8000).view(-1, 2)
    labels = torch.ones(4000, dtype=torch.int64)
    dropped, _ = task.dropped(labels, None, keyed_uniform(11, ids, purpose="label", shape=(1,)))
    assert dropped is not None
    assert set(dropped.tolist()) == {1, 3}
    assert float((dropped == 3).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_an_unconditional_task_sees_no_labels() -> None:
    task, (_, ids, labels) = make_task(num_classes=None), batch()
    assert task.dropped(labels, None, torch.zeros(len(ids), 1)) == (None, None)


def shown(task: Task, count: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
    """Which of so many samples a model sees with their label, and which with their text: bool [n] each."""
    ids, seen = torch.arange(2 * count).view(-1, 2), []

    def spy(x: Tensor, t: Tensor, labels: Tensor | None, *text: Tensor) -> Tensor:
        assert labels is not None
        seen.append((labels != 3, text[0][:, 0, 0] == 1.0) if text else (labels != 3,) * 2)
        return x

    text = (torch.ones(count, 2, 4), torch.ones(count, 2, dtype=torch.bool))
    labels = torch.ones(count, dtype=torch.int64)
    task.training_losses(spy, torch.zeros(count, CHANNELS, 2, 2), ids, labels, epoch, text)
    return seen[0]


EMPTY = (torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("joint", [0.0, 0.15, 1.0])
def test_two_conditions_are_dropped_independently_and_jointly(joint: float) -> None:
    count, dropouts = 20_000, {"label_dropout": 0.3, "text_dropout": 0.2, "joint_dropout": joint}
    labelled, prompted = shown(make_task(empty_text=EMPTY, **dropouts), count)
    for name, share in combination_shares(0.3, 0.2, joint).items():
        there = (labelled == ("class" in name)) & (prompted == ("text" in name))
        # Four standard deviations of a share of so many draws; nothing at all where the share is none.
        assert float(there.float().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5)


def test_the_draws_of_two_conditions_are_keyed_each_by_its_purpose() -> None:
    dropouts = {"label_dropout": 0.3, "text_dropout": 0.2, "joint_dropout": 0.15}
    labelled, prompted = shown(make_task(empty_text=EMPTY, **dropouts), 500, epoch=4)
    ids = torch.arange(1000).view(-1, 2)
    by_label, by_text, by_both = (
        keyed_uniform(11, ids, purpose=purpose, counter=4) < share
        for purpose, share in (("label", 0.3), ("text", 0.2), ("joint", 0.15))
    )
    assert torch.equal(labelled, ~(by_label | by_both))
    assert torch.equal(prompted, ~(by_text | by_both))


def test_one_condition_goes_by_the_draw_it_has_always_gone_by() -> None:
    labelled, _ = shown(make_task(label_dropout=0.3, text_dropout=0.9, joint_dropout=0.9), 500, epoch=4)
    ids = torch.arange(1000).view(-1, 2)
    assert torch.equal(labelled, keyed_uniform(11, ids, purpose="label", counter=4) >= 0.3)


def test_noise_time_and_labels_are_keyed_by_run_seed_sample_and_epoch() -> None:
    task, (latents, ids, labels) = make_task(), batch()
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def spy(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.append((x, t, labels))
        return torch.zeros_like(x)

    task.training_losses(spy, latents, ids, labels, epoch=5)
    x0 = task.clean(latents, ids, 5)
    noise = keyed_normal(11, ids, purpose="noise", counter=5, shape=x0.shape[1:])
    t = task.density.times(keyed_uniform(11, ids, purpose="time", counter=5), latent_pixels=16)
    dropped = keyed_uniform(11, ids, purpose="label", counter=5) < 0.2
    ((x_t, time, given),) = seen
    assert torch.equal(time, t)
    torch.testing.assert_close(x_t, (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * noise)
    assert given is not None
    assert torch.equal(given, torch.where(dropped, 3, labels))
