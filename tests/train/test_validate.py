"""The validation loss: fixed, stratified, the same for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.diffusion.rng import ids_from_words
from pipeline.train import collectives
from pipeline.train.hooks import Chunk, Validation
from tests.train.helpers import make_task, new_run, on_ranks, samples

CHUNK = 5


def chunks(count: int = 3) -> list[Chunk]:
    latents, ids, labels = samples()
    spans = [slice(i * CHUNK, (i + 1) * CHUNK) for i in range(count)]
    return [Chunk(torch.from_numpy(latents[s]), ids_from_words(ids[s]), torch.from_numpy(labels[s])) for s in spans]


def measure(root: Path, count: int = 3, strategy: str = "ddp") -> dict[str, float]:
    state, _, _ = new_run(root, strategy=strategy)
    return Validation(make_task(), state.model, chunks(count), num_timesteps=4, ema=("power",)).run(state)


def test_asking_twice_gives_the_same_answer_and_leaves_the_weights(tmp_path: Path) -> None:
    state, _, _ = new_run(tmp_path)
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    question = Validation(make_task(), state.model, chunks(), num_timesteps=4, ema=("power",))
    state.ema.averages["power"]["first.weight"].zero_()
    first, second = question.run(state), question.run(state)
    assert first == second
    assert first["val/loss"] != first["val/power/loss"]
    assert all(torch.equal(v, before[k]) for k, v in state.model.state_dict().items())
    assert state.model.training


def test_strata_cover_time_and_average_to_the_whole(tmp_path: Path) -> None:
    figures = measure(tmp_path)
    strata = [figures[f"val/loss_t{j}"] for j in range(4)]
    assert len(set(strata)) == 4
    assert figures["val/loss"] == pytest.approx(sum(strata) / 4)


def test_a_sample_is_asked_the_same_in_any_company(tmp_path: Path) -> None:
    # Losses per sample do not change when other chunks join.
    state, _, _ = new_run(tmp_path)
    few = Validation(make_task(), state.model, chunks(1), num_timesteps=2)._losses()
    many = Validation(make_task(), state.model, chunks(3), num_timesteps=2)._losses()
    assert torch.equal(few, many[:CHUNK])


def _measure_on_ranks(root: str, strategy: str) -> None:
    figures = measure(Path(root), strategy=strategy)
    if collectives.rank() == 0:
        (Path(root) / "figures.json").write_text(json.dumps(figures))


@pytest.mark.slow
def test_two_ranks_answer_as_one_bitwise(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each rank has: sums in another order have other last bits
    alone = measure(tmp_path)
    torch.set_num_threads(threads)
    on_ranks(2, _measure_on_ranks, str(tmp_path), "ddp")
    assert json.loads((tmp_path / "figures.json").read_text()) == alone


@pytest.mark.slow
def test_sharded_ranks_with_an_odd_number_of_chunks_agree(tmp_path: Path) -> None:
    alone = measure(tmp_path)
    on_ranks(2, _measure_on_ranks, str(tmp_path), "fsdp2")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found == pytest.approx(alone, rel=1e-5)
