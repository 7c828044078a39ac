"""Philox against its published vectors; keyed draws against what they are keyed by."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters as dynamo_counters
from torch._inductor import metrics

from pipeline.diffusion import rng
from tests.support.launches import META, Launches

# kat_vectors of the Random123 distribution that accompanies Salmon et al. 2011: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


def some_ids(count: int, prefix: str = "row") -> torch.Tensor:
    return rng.ids_from_bytes([rng.id_from_text(f"{prefix}{i}") for i in range(count)])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    result = rng.philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert [int(word) for word in result] == [int(word) for word in words(expected)]


@pytest.mark.integration
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(3,), (4, 5, 7), (1,), (2, 8, 8)]),
    st.randoms(use_true_random=False),
)
def test_a_row_does_not_depend_on_its_batch(
    num_rows: int, counter: int, shape: tuple[int, ...], random: object
) -> None:
    ids = some_ids(num_rows)
    whole = rng.keyed_normal(7, ids, purpose="noise", counter=counter, shape=shape)
    order = list(range(num_rows))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = rng.keyed_normal(7, ids[order], purpose="noise", counter=counter, shape=shape)
    assert torch.equal(shuffled, whole[order])
    for row in range(num_rows):
        alone = rng.keyed_normal(7, ids[row : row + 1], purpose="noise", counter=counter, shape=shape)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.integration
def test_large_batches_and_single_rows_agree_bitwise() -> None:
    ids = some_ids(64)
    whole = rng.keyed_normal(0, ids, purpose="noise", counter=3, shape=(4, 32, 32))
    for row in (0, 31, 63):
        alone = rng.keyed_normal(0, ids[row : row + 1], purpose="noise", counter=3, shape=(4, 32, 32))
        assert torch.equal(alone[0], whole[row])


def test_every_part_of_the_key_matters() -> None:
    ids = some_ids(2)
    base = rng.keyed_normal(1, ids, purpose="noise", counter=0, shape=(8,))
    flipped = ids.clone()
    for bit in (0, 31, 32, 63):
        for word in (0, 1):
            changed = flipped.clone()
            changed[0, word] ^= torch.tensor(1 << bit if bit < 63 else -(1 << 63))
            assert not torch.equal(rng.keyed_normal(1, changed, purpose="noise", shape=(8,))[0], base[0])
    for other in (
        rng.keyed_normal(2, ids, purpose="noise", counter=0, shape=(8,)),
        rng.keyed_normal(1, ids, purpose="label", counter=0, shape=(8,)),
        rng.keyed_normal(1, ids, purpose="noise", counter=1, shape=(8,)),
    ):
        assert not torch.isclose(other, base).any()


def test_draws_are_pinned() -> None:
    """A change of these numbers would silently change every resumed run and every reproducible image."""
    ids = rng.ids_from_bytes([bytes(range(16)), b"\xff" * 16])
    assert ids.tolist() == [[0x0706050403020100, 0x0F0E0D0C0B0A0908], [-1, -1]]
    words_ = rng.keyed_words(1234, ids, purpose="noise", counter=5, count=3)
    assert words_.tolist() == PINNED_WORDS
    uniform = rng.keyed_uniform(1234, ids, purpose="noise", counter=5, shape=(3,))
    assert uniform.tolist() == [[((word >> 9) + 0.5) / 2**23 for word in row] for row in PINNED_WORDS]


PINNED_WORDS = [[1091090794, 2810936530, 2230016435], [3829334495, 3795360602, 3149795189]]


def test_normal_numbers_are_normal() -> None:
    draws = rng.keyed_normal(0, some_ids(64), purpose="noise", shape=(4, 32, 32)).double().flatten()
    num = draws.numel()
    assert abs(draws.mean()) < 5 / num**0.5
    assert abs(draws.var() - 1) < 5 * (2 / num) ** 0.5
    assert abs((draws**4).mean() - 3) < 5 * (96 / num) ** 0.5
    # Kolmogorov-Smirnov distance to the normal distribution: 1.95 / sqrt(n) is the 0.1 % point.
    cdf = torch.special.ndtr(draws.sort().values)
    steps = torch.arange(1, num + 1) / num
    assert (cdf - steps).abs().max() < 1.95 / num**0.5


def test_neighbouring_rows_counters_and_positions_are_uncorrelated() -> None:
    words_of_ids = torch.stack([torch.arange(512), torch.zeros(512, dtype=torch.int64)], dim=1)  # worst-case ids
    epochs = [rng.keyed_normal(0, words_of_ids, purpose="noise", counter=c, shape=(64,)).double() for c in (0, 1)]
    a, b = epochs
    for x, y in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[:, :32], a[:, 32:])):
        assert abs((x * y).mean()) < 5 / x.numel() ** 0.5


def test_uniform_numbers_are_uniform_and_open() -> None:
    draws = rng.keyed_uniform(3, some_ids(2000), purpose="time", shape=(32,)).double().flatten()
    assert draws.min() > 0
    assert draws.max() < 1
    steps = torch.arange(1, draws.numel() + 1) / draws.numel()
    assert (draws.sort().values - steps).abs().max() < 1.95 / draws.numel() ** 0.5
    assert rng.keyed_uniform(3, some_ids(5), purpose="time").shape == (5,)


def test_extreme_words_stay_inside_the_open_interval() -> None:
    for word in (0, 2**32 - 1):
        full = torch.full((1, 2), word, dtype=torch.int64)
        uniform = rng.uniform_of(full)
        assert ((uniform > 0) & (uniform < 1)).all()
        assert torch.isfinite(rng.normal_of(full, (2,))).all()


COUNTS = {"noise": 96, "time": 1, "label": 1, "posterior": 90, "none": 0}


def test_purposes_drawn_together_are_those_drawn_alone() -> None:
    ids = some_ids(5)
    together = rng.keyed_words_for(9, ids, COUNTS, counter=2**32 - 1)
    assert list(together) == list(COUNTS)
    for purpose, count in COUNTS.items():
        alone = rng.keyed_words(9, ids, purpose=purpose, counter=2**32 - 1, count=count)
        assert alone.shape == (5, count)
        assert torch.equal(together[purpose], alone)


def test_a_draw_brings_nothing_to_the_device_and_waits_for_nothing() -> None:
    ids = torch.zeros(8, 2, dtype=torch.int64, device=META)
    first, later = Launches(), Launches()
    with first:
        rng.keyed_words_for(4, ids, COUNTS, counter=0)
    assert first.blocking_uploads > 0, "constants are brought once: a count of none would be no count"
    with later:
        rng.keyed_words_for(4, ids, COUNTS, counter=1)
    assert later.blocking_uploads == 0
    assert not later.synchronisations
    # Two passes of ten rounds for all purposes together, as they are written: where nothing is compiled.
    assert later.launches.total() <= 2 * 10 * 14 + 20


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_the_words_are_the_same_in_two_kernels_whatever_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(rng._words_of_blocks, dynamic=True)
    metrics.reset()
    torch._dynamo.reset()
    sizes = [(9, COUNTS), (17, {"noise": 40, "time": 1}), (4, COUNTS)]
    written = [rng.keyed_words_for(3, some_ids(rows), counts, counter=at) for at, (rows, counts) in enumerate(sizes)]
    monkeypatch.setattr(rng, "_fused_words_of_blocks", compiled)
    for at, (rows, counts) in enumerate(sizes):
        words = rng.keyed_words_for(3, some_ids(rows), counts, counter=at)
        assert all(torch.equal(words[purpose], written[at][purpose]) for purpose in counts)
    assert metrics.generated_kernel_count <= 2
    assert dynamo_counters["stats"]["unique_graphs"] == 1


def test_ids_from_words_is_ids_from_bytes() -> None:
    raw = [rng.id_from_text(f"k{i}") for i in range(5)]
    as_words = np.frombuffer(b"".join(raw), dtype="<u8").reshape(-1, 2)
    assert torch.equal(rng.ids_from_words(as_words), rng.ids_from_bytes(raw))
    assert len({rng.id_from_text(f"k{i}") for i in range(1000)}) == 1000


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"ids must be int64 \[b, 2\].*float32"):
        rng.keyed_uniform(0, torch.zeros(3, 2), purpose="x")
    with pytest.raises(ValueError, match=r"counter must be in \[0, 2\*\*32\), got -1"):
        rng.keyed_uniform(0, some_ids(1), purpose="x", counter=-1)
    with pytest.raises(ValueError, match="exactly 16 bytes, got 3: 616263"):
        rng.ids_from_bytes([b"abc"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu() -> None:
    ids = some_ids(16)
    on_cpu = rng.keyed_normal(0, ids, purpose="noise", shape=(4, 16, 16))
    on_gpu = rng.keyed_normal(0, ids.cuda(), purpose="noise", shape=(4, 16, 16)).cpu()
    assert torch.allclose(on_cpu, on_gpu, rtol=0, atol=1e-6)
    uniform = rng.keyed_uniform(0, ids.cuda(), purpose="time", shape=(9,)).cpu()
    assert torch.equal(uniform, rng.keyed_uniform(0, ids, purpose="time", shape=(9,)))
    on_gpu_words = rng.keyed_words_for(0, ids.cuda(), COUNTS, counter=7)
    for purpose, words_ in rng.keyed_words_for(0, ids, COUNTS, counter=7).items():
        assert torch.equal(on_gpu_words[purpose].cpu(), words_)
