"""The loop: a killed and resumed run is the undisturbed one, on any number of ranks the same mathematics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import ConflictError, PipelineError
from pipeline.train import collectives
from pipeline.train.checkpoint import list_complete
from pipeline.train.loop import Callbacks, Hook, train
from tests.train.helpers import (
    BATCH,
    FakeBatch,
    assert_equal_states,
    fake_stream,
    make_settings,
    make_task,
    new_run,
    on_ranks,
    snapshot,
)

pytestmark = pytest.mark.integration


class Killed(Exception):
    """Stands for the end of a process in the middle of a step."""


def dying(stream: Any, at_step: int) -> Any:
    """The stream, whose process dies instead of delivering batch `at_step`."""

    def open_stream(start: int) -> Iterator[FakeBatch]:
        for step, batch in enumerate(stream(start), start):
            if step == at_step:
                raise Killed
            yield batch

    return open_stream


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without the figures that depend on the clock."""
    return [{k: v for k, v in r.items() if k not in ("images_per_s", "data_wait_share")} for r in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    state, engine, store = new_run(tmp_path_factory.mktemp("undisturbed"))
    assert (
        train(
            state, engine, make_task(), fake_stream(), make_settings(), store, callbacks=Callbacks(log=records.append)
        )
        == "done"
    )
    return snapshot(state), timeless(records)


def test_loss_falls_and_progress_is_counted_in_images(undisturbed: Any) -> None:
    _, records = undisturbed
    assert records[-1]["loss"] < records[0]["loss"]
    assert [r["images"] for r in records] == [18, 36, 54, 72, 90, 108, 120]
    assert records[-1]["learning_rate"] == 0.0
    assert {"loss_t0", "loss_t3", "grad_norm", "epoch", "step"} <= records[0].keys()


@pytest.mark.parametrize("kill_at", range(1, 20))
def test_a_run_killed_at_any_step_and_resumed_has_bitwise_the_same_weights(
    kill_at: int, undisturbed: Any, tmp_path: Path
) -> None:
    final, history = undisturbed
    records: list[dict[str, Any]] = []
    state, engine, store = new_run(tmp_path)
    with pytest.raises(Killed):
        train(
            state,
            engine,
            make_task(),
            dying(fake_stream(), kill_at),
            make_settings(),
            store,
            callbacks=Callbacks(log=records.append),
        )
    store.wait()

    resumed_at: list[int] = []
    state, engine, store = new_run(tmp_path)
    torch.manual_seed(999)  # whatever generator state the new process happens to have
    status = train(
        state,
        engine,
        make_task(),
        fake_stream(),
        make_settings(),
        store,
        callbacks=Callbacks(log=records.append, resume=lambda s: resumed_at.append(s.step)),
    )
    assert status == "done"
    assert resumed_at == [kill_at // 4 * 4]
    assert_equal_states(snapshot(state), final)
    # The replayed records say what the first ones said, so that dropping either leaves the same history.
    by_step = {r["step"]: r for r in timeless(records)}
    assert [by_step[r["step"]] for r in history] == history


def test_a_finished_run_trains_no_more(tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path)
    train(state, engine, make_task(), fake_stream(), make_settings(), store)
    before = snapshot(state)
    state, engine, store = new_run(tmp_path)
    assert train(state, engine, make_task(), dying(fake_stream(), 0), make_settings(), store) == "done"
    assert_equal_states(snapshot(state), before)


def test_a_stop_request_checkpoints_first_and_the_next_run_goes_on_from_there(
    undisturbed: Any, tmp_path: Path
) -> None:
    calls = iter(range(100))
    state, engine, store = new_run(tmp_path)
    stop = Callbacks(should_stop=lambda: next(calls) == 6)
    status = train(state, engine, make_task(), fake_stream(), make_settings(), store, callbacks=stop)
    assert (status, state.step) == ("stopped", 7)
    resumed_at: list[int] = []
    state, engine, store = new_run(tmp_path)
    seen = Callbacks(resume=lambda s: resumed_at.append(s.step))
    train(state, engine, make_task(), fake_stream(), make_settings(), store, callbacks=seen)
    assert resumed_at == [7]
    assert_equal_states(snapshot(state), undisturbed[0])


def test_accumulation_is_the_same_step_as_one_large_batch(undisturbed: Any, tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path)
    train(state, engine, make_task(), fake_stream(), make_settings(micro_batch=2), store)
    for key, value in snapshot(state).items():
        torch.testing.assert_close(value, undisturbed[0][key], rtol=1e-3, atol=2e-5, msg=key)


def test_bf16_trains_near_fp32_and_keeps_its_weights_in_fp32(tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        state, engine, store = new_run(tmp_path / precision)
        train(state, engine, make_task(), fake_stream(), make_settings(precision=precision), store)
        found[precision] = snapshot(state)
        assert all(p.dtype == torch.float32 for p in state.params.values())
    moved = 0.0
    for key, value in found["fp32"].items():
        if key.startswith("model/"):
            torch.testing.assert_close(found["bf16"][key], value, rtol=0.0, atol=0.05)
            moved += float((found["bf16"][key] - value).abs().sum())
    assert moved > 0.0, "the arithmetic was that of fp32"


def test_hooks_run_when_a_multiple_of_images_is_crossed_and_at_the_end(tmp_path: Path) -> None:
    seen: list[int] = []
    records: list[dict[str, Any]] = []
    hook = Hook(50, lambda s: (seen.append(s.images), {"val/loss": 1.0})[1])
    state, engine, store = new_run(tmp_path)
    calls = Callbacks(hooks=[hook], log=records.append)
    train(state, engine, make_task(), fake_stream(), make_settings(), store, callbacks=calls)
    assert seen == [54, 102, 120]
    assert [r["images"] for r in records if "val/loss" in r] == seen


# -- the guard -------------------------------------------------------------------------------------------------


def test_a_poisoned_batch_is_skipped_named_and_counted(tmp_path: Path) -> None:
    skips: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    state, engine, store = new_run(tmp_path)
    train(
        state,
        engine,
        make_task(),
        fake_stream(poison=(2, 5)),
        make_settings(),
        store,
        callbacks=Callbacks(skip=skips.append, log=records.append),
    )
    assert [s["step"] for s in skips] == [2, 5]
    assert len(skips[0]["sample_ids"]) == BATCH
    assert all(len(i) == 32 for i in skips[0]["sample_ids"])
    assert records[-1]["skipped_steps"] == 2
    assert all(torch.isfinite(v).all() for v in snapshot(state).values())


def test_a_skipped_step_changes_neither_weights_nor_averages_nor_optimiser(tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path)
    before = snapshot(state)
    settings = make_settings(images=BATCH)
    train(state, engine, make_task(), fake_stream(poison=(0,)), settings, store)
    assert_equal_states(snapshot(state), before)
    assert (state.images, state.skipped_steps) == (BATCH, 1)


def test_an_exploding_gradient_is_skipped_too(tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path)
    before = snapshot(state)
    train(state, engine, make_task(), fake_stream(), make_settings(images=BATCH, guard_norm=1e-9), store)
    assert_equal_states(snapshot(state), before)


def test_too_many_skipped_steps_in_a_row_without_a_checkpoint_stop_the_run(tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path)
    with pytest.raises(PipelineError, match=r"Training diverged: 3 steps in a row[\s\S]*after 0 returns"):
        train(
            state,
            engine,
            make_task(),
            fake_stream(poison=tuple(range(2, 20))),
            make_settings(max_skipped_in_a_row=3),
            store,
        )
    assert state.step == 4


def test_after_too_many_skipped_steps_the_run_goes_back_to_its_checkpoint_and_on_after_the_bad_data(
    tmp_path: Path,
) -> None:
    # Checkpoints at 4, 8, ... steps; steps 6 to 8 are bad, and what step 5 did is given up.
    settings = make_settings(max_skipped_in_a_row=3, checkpoint_images=4 * BATCH, images=12 * BATCH)
    at_four, engine, store = new_run(tmp_path / "short")
    short = make_settings(max_skipped_in_a_row=3, checkpoint_images=4 * BATCH, images=4 * BATCH, decay_images=0)
    settings = replace(settings, decay_images=0)
    train(at_four, engine, make_task(), fake_stream(), short, store)
    state, engine, store = new_run(tmp_path / "long")
    seen: list[dict[str, Tensor]] = []
    after = Hook(9 * BATCH, lambda state: seen.append(snapshot(state)) or {})
    bad = fake_stream(poison=(6, 7, 8))
    train(state, engine, make_task(), bad, settings, store, callbacks=Callbacks(hooks=[after]))
    assert_equal_states(seen[0], snapshot(at_four))
    assert (state.step, state.rollbacks, state.skipped_steps, state.skipped_in_a_row) == (12, 1, 3, 0)
    # A run that is killed meanwhile and repeats all that ends the same.
    again, engine, store = new_run(tmp_path / "again")
    with pytest.raises(Killed):
        train(again, engine, make_task(), dying(fake_stream(poison=(6, 7, 8)), 10), settings, store)
    again, engine, store = new_run(tmp_path / "again")
    train(again, engine, make_task(), fake_stream(poison=(6, 7, 8)), settings, store)
    assert_equal_states(snapshot(again), snapshot(state))


def test_a_run_that_goes_back_too_often_stops(tmp_path: Path) -> None:
    settings = make_settings(max_skipped_in_a_row=2, max_rollbacks=2, checkpoint_images=BATCH)
    state, engine, store = new_run(tmp_path)
    with pytest.raises(PipelineError, match=r"Training diverged[\s\S]*after 2 returns to a checkpoint"):
        train(state, engine, make_task(), fake_stream(poison=tuple(range(3, 20))), settings, store)
    assert (state.step, state.rollbacks) == (8, 2)


def test_a_notice_that_a_node_leaves_makes_a_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path)
    answers = iter([False, True])
    calls = Callbacks(poll_due=lambda: state.step in (2, 5), preempted=lambda: next(answers))
    settings = make_settings(images=9 * BATCH, checkpoint_images=100 * BATCH)
    assert train(state, engine, make_task(), fake_stream(), settings, store, callbacks=calls) == "done"
    assert [c.images for c in list_complete(store.root)] == [6 * BATCH, 9 * BATCH]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    state, engine, store = new_run(tmp_path, identity={"dataset": "one"})
    train(state, engine, make_task(), fake_stream(), make_settings(), store)
    state, engine, store = new_run(tmp_path, identity={"dataset": "two"})
    with pytest.raises(ConflictError, match=r"dataset: checkpoint 'one', now 'two'"):
        train(state, engine, make_task(), fake_stream(), make_settings(), store)


# -- several ranks ---------------------------------------------------------------------------------------------


def _train_on_ranks(root: str, images: int, strategy: str, batch_size: int, options: dict[str, Any]) -> None:
    path = Path(root)
    if strategy == "hsdp":  # two ranks to a node
        options = {**options, "node": collectives.rank() // 2}
    state, engine, store = new_run(path, strategy=strategy, **options)
    records: list[dict[str, Any]] = []
    train(
        state,
        engine,
        make_task(),
        fake_stream(collectives.rank(), collectives.world_size()),
        make_settings(images=images, micro_batch=2),
        store,
        callbacks=Callbacks(log=records.append),
    )
    whole = snapshot(state)
    if collectives.rank() == 0:
        torch.save(whole, path / "final.pt")
        (path / "records.json").write_text(json.dumps(records))


def _final(path: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = torch.load(path / "final.pt", weights_only=True)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("hsdp", 4)])
def test_more_ranks_give_the_same_weights_within_float_rounding(
    strategy: str, world_size: int, undisturbed: Any, tmp_path: Path
) -> None:
    on_ranks(world_size, _train_on_ranks, str(tmp_path), 20 * BATCH, strategy, BATCH, {})
    for key, value in _final(tmp_path).items():
        torch.testing.assert_close(value, undisturbed[0][key], rtol=1e-3, atol=2e-5, msg=f"{key}")
    records = json.loads((tmp_path / "records.json").read_text())
    np.testing.assert_allclose([r["loss"] for r in records], [r["loss"] for r in undisturbed[1]], rtol=1e-5)


@pytest.mark.slow
def test_a_run_saved_on_two_ranks_goes_on_on_one_and_on_three(undisturbed: Any, tmp_path: Path) -> None:
    on_ranks(2, _train_on_ranks, str(tmp_path), 8 * BATCH, "fsdp2", BATCH, {})
    on_ranks(3, _train_on_ranks, str(tmp_path), 16 * BATCH, "ddp", BATCH, {})
    on_ranks(1, _train_on_ranks, str(tmp_path), 20 * BATCH, "ddp", BATCH, {})
    # The schedule of the shorter legs differs, so only the end of an equal schedule is compared elsewhere;
    # here the optimiser's step count proves that every leg continued the one before.
    final = _final(tmp_path)
    assert float(final["optimizer/step/first.weight"]) == 20.0


@pytest.mark.slow
def test_a_run_on_two_nodes_of_shards_goes_on_whole_and_back(undisturbed: Any, tmp_path: Path) -> None:
    for images, strategy, ranks in ((8, "hsdp", 4), (12, "ddp", 2), (16, "hsdp", 4), (20, "fsdp2", 2)):
        on_ranks(ranks, _train_on_ranks, str(tmp_path), images * BATCH, strategy, BATCH, {})
        final = _final(tmp_path)
        assert float(final["optimizer/step/first.weight"]) == images
    assert final.keys() == undisturbed[0].keys()
