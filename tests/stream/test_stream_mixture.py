"""A mixture honours its weights in every block and resumes at any step."""

from __future__ import annotations

import json
import threading
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.stream.data import Batch
from pipeline.stream.loader import LatentStream
from pipeline.stream.mixture import BLOCK, FOREVER, MixtureStream, Part, apportion, open_mixture, phases_of
from tests.stream.latent_rows import MemoryRows

WEIGHTS = [0.7, 0.2, 0.1]


def mixture(seed: int = 1, weights: list[float] = WEIGHTS, **changes: object) -> MixtureStream:
    datasets = [MemoryRows([("64x64", 16 + 8 * at)] * 3) for at in range(3)]
    given = {"seed": 3, "batch_size": 4, "lanes": 4, "window_bytes": 10**6, **changes}
    return MixtureStream([LatentStream(dataset, **given) for dataset in datasets], weights, seed=seed)


def take(stream: MixtureStream, count: int) -> list[Batch]:
    batches = iter(stream)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def labels(batches: list[Batch]) -> list[tuple[int, int, int, list[int]]]:
    return [(batch.step, batch.epoch, batch.dataset, batch.labels.tolist()) for batch in batches]


@pytest.mark.integration
def test_weights_hold_in_every_block_and_nearly_so_in_any_stretch() -> None:
    before = set(threading.enumerate())
    batches = take(mixture(), 2 * BLOCK)
    assert set(threading.enumerate()) <= before
    for block in (batches[:BLOCK], batches[BLOCK:]):
        served = Counter(batch.dataset for batch in block)
        assert [served[at] for at in range(3)] == [717, 205, 102]
    for steps in range(0, 2 * BLOCK, 50):
        served = Counter(batch.dataset for batch in batches[:steps])
        assert all(abs(served[at] - weight * steps) < 4 for at, weight in enumerate(WEIGHTS))


@pytest.mark.integration
def test_a_mixture_resumes_at_any_step_and_for_any_number_of_workers() -> None:
    whole = take(mixture(), BLOCK + 60)
    for step in (*range(0, 60, 7), BLOCK - 1, BLOCK, BLOCK + 1):
        again = mixture()
        assert again.resume(json.loads(json.dumps(mixture().state(step)))) == step
        assert labels(take(again, 20)) == labels(whole[step : step + 20])
    shares = [take(mixture(rank=rank, world_size=2), 40) for rank in range(2)]
    for batch, left, right in zip(whole, *shares, strict=False):
        assert np.array_equal(batch.latents, np.concatenate([left.latents, right.latents]))


def test_two_iterations_in_progress_do_not_touch_each_other() -> None:
    stream, want = mixture(), labels(take(mixture(), 30))
    first = iter(stream)
    stream.start_step = 20
    second = iter(stream)
    got: tuple[list[Batch], list[Batch]] = ([], [])
    for _ in range(10):
        got[0].append(next(first))
        got[1].append(next(second))
    stream.close()
    assert labels(got[0]) == want[:10]
    assert labels(got[1]) == want[20:]


def test_closing_ends_a_mixture() -> None:
    before = set(threading.enumerate())
    stream = mixture()
    batches = iter(stream)
    next(batches)
    stream.close()
    assert set(threading.enumerate()) <= before
    assert next(batches, None) is None


def test_a_state_of_another_mixture_is_refused() -> None:
    with pytest.raises(ConflictError, match=r"shares: .* in the state"):
        mixture(weights=[0.6, 0.3, 0.1]).resume(mixture().state(5))
    with pytest.raises(ConflictError, match=r"datasets\[2\].seed: 3 in the state, 4 now"):
        other = MixtureStream([*mixture().streams[:2], _other_seed()], WEIGHTS, seed=1)
        other.resume(mixture().state(5))


def _other_seed() -> LatentStream:
    dataset = MemoryRows([("64x64", 32)] * 3)
    return LatentStream(dataset, seed=4, batch_size=4, lanes=4, window_bytes=10**6)


def opened(window_bytes: int, **changes: object) -> MixtureStream:
    parts = [Part(f"s3://{at}", MemoryRows([("64x64", 16 + 8 * at)] * 3), w) for at, w in enumerate(WEIGHTS)]
    return open_mixture(parts, **{"seed": 3, "batch_size": 4, "lanes": 4, "window_bytes": window_bytes, **changes})


def test_the_memory_is_that_of_all_datasets_together() -> None:
    least = [2 * 4 * (100 * rows + 1) for rows in (16, 24, 32)]
    exact = opened(sum(least))
    assert [stream.order.spec.window_bytes for stream in exact.streams] == least
    rich = [stream.order.spec.window_bytes for stream in opened(sum(least) + 10 * BLOCK).streams]
    assert sum(rich) <= sum(least) + 10 * BLOCK
    assert [given - need for given, need in zip(rich, least, strict=True)] == [7170, 2050, 1020]
    rule = r"window_bytes = \d+[\s\S]*at least 12808 \+ 19208 \+ 25608 bytes[\s\S]*allow 57624 bytes"
    with pytest.raises(ConfigError, match=rule):
        opened(sum(least) - 1)


def test_an_error_names_the_dataset_it_is_about() -> None:
    with pytest.raises(ConfigError, match=r"s3://0: the data do not fill a single batch[\s\S]*holds 48"):
        opened(10**6, batch_size=52)
    stream = opened(10**6)
    stream.streams[1]._dataset.tables[0] = stream.streams[1]._dataset.tables[0].slice(1)
    with pytest.raises(InputError, match=r"s3://1: row group 0 of the latent dataset cannot be used"):
        take(stream, 20)


# -- datasets that begin late or end early ------------------------------------------------------------------

SPANS = [(0, 30), (20, FOREVER), (50, FOREVER)]  # small images, then medium ones, at last large ones beside them


def scheduled(**changes: object) -> MixtureStream:
    parts = [
        Part(f"s3://{at}", MemoryRows([("64x64", 16 + 8 * at)] * 3), w, steps=SPANS[at])
        for at, w in enumerate(WEIGHTS)
    ]
    return open_mixture(parts, **{"seed": 3, "batch_size": 4, "lanes": 4, "window_bytes": 10**6, **changes})


def test_each_is_served_in_its_steps_alone_and_goes_on_where_it_was() -> None:
    batches = take(scheduled(), 50 + BLOCK)
    served = [{batch.dataset for batch in batches[a:b]} for a, b in ((0, 20), (20, 30), (30, 50), (50, 50 + BLOCK))]
    assert served == [{0}, {0, 1}, {1}, {1, 2}]
    assert Counter(b.dataset for b in batches[50:]) == {1: 683, 2: 341}  # their weights are 2 to 1
    for at in range(3):
        alone = take(scheduled().streams[at], 30)
        mine = [batch for batch in batches if batch.dataset == at][:30]
        assert [b.labels.tolist() for b in mine] == [b.labels.tolist() for b in alone[: len(mine)]]


def test_a_schedule_resumes_at_any_step() -> None:
    whole = take(scheduled(), 90)
    for step in (0, 19, 20, 21, 29, 30, 31, 50, 70):
        again = scheduled()
        assert again.resume(json.loads(json.dumps(scheduled().state(step)))) == step
        assert labels(take(again, 20)) == labels(whole[step : step + 20])
    with pytest.raises(ConflictError, match=r"phases: \(absent\) in the state"):
        scheduled().resume(opened(10**6).state(5))


def test_the_memory_is_that_of_all_that_are_served_at_a_time() -> None:
    least = [2 * 4 * (100 * rows + 1) for rows in (16, 24, 32)]
    windows = [stream.order.spec.window_bytes for stream in scheduled(window_bytes=least[1] + least[2]).streams]
    assert windows[1:] == least[1:]
    assert windows[0] > least[0]  # the last one is not there beside it
    with pytest.raises(ConfigError, match=r"at least 19208 \+ 25608 bytes"):
        scheduled(window_bytes=least[1] + least[2] - 1)


@pytest.mark.parametrize(
    ("spans", "told"),
    [
        ([(0, 10), (12, FOREVER)], "from step 10 up to step 12"),
        ([(0, 10), (5, 20)], "from step 20 on"),
        ([(3, FOREVER), (4, FOREVER)], "from step 0 up to step 3"),
    ],
)
def test_a_step_that_no_dataset_serves_is_refused(spans: list[tuple[int, int]], told: str) -> None:
    with pytest.raises(ConfigError, match=f"No dataset is served {told}"):
        phases_of([1.0, 1.0], spans)


@pytest.mark.parametrize("total", [0, 1, 7, BLOCK])
def test_whole_numbers_in_proportion(total: int) -> None:
    parts = apportion([3.0, 1.0, 0.5], total)
    assert parts.sum() == total
    assert np.abs(parts - np.array([3.0, 1.0, 0.5]) / 4.5 * total).max() < 1


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="one positive number for each of the 3 datasets"):
        mixture(weights=weights)
    with pytest.raises(ConfigError, match="at least 1/1024"):
        mixture(weights=[1.0, 1.0, 1e-6])
