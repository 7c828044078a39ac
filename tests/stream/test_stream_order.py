"""The order is a bijection, elastic, proportional, bounded in memory, and never changes by accident."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.stream import order as module
from pipeline.stream.data import layout_of
from pipeline.stream.order import PARTS, ROW_GROUPS, Layout, Order, OrderSpec, permutation
from tests.stream.latent_rows import MemoryRows, global_batch

GROUPS = st.lists(
    st.tuples(st.sampled_from(["64x64", "64x96", "96x64"]), st.integers(1, 40)), min_size=1, max_size=12
)
RULES = st.sampled_from([PARTS, ROW_GROUPS])
SLOTS = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3, 4, 8]))  # rows of a slot, lanes


def plain_layout(groups: list[tuple[str, int]]) -> Layout:
    names = sorted({bucket for bucket, _ in groups})
    rows = np.array([count for _, count in groups])
    return Layout(tuple(names), np.array([names.index(bucket) for bucket, _ in groups]), rows, 100 * rows)


def order_of(groups: list[tuple[str, int]], slot: int, lanes: int, **changes: object) -> Order | None:
    """An order over the groups; None where no bucket fills a batch (which has its own test)."""
    layout = plain_layout(groups)
    largest = np.bincount(layout.bucket_of, layout.rows).max()
    if largest < slot * lanes:
        return None
    given = {"seed": 5, "batch_size": slot * lanes, "lanes": lanes, "window_bytes": 4_000_000, **changes}
    return Order(layout, OrderSpec(**given))


@given(count=st.integers(0, 3000), key=st.tuples(st.integers(), st.integers(0, 9)))
def test_a_permutation_is_a_bijection_that_its_key_decides(count: int, key: tuple[int, int]) -> None:
    order = permutation(count, *key)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, permutation(count, *key))
    if count > 50:
        assert not np.array_equal(order, permutation(count, key[0], key[1] + 1))


@pytest.mark.integration
@settings(deadline=None)
@given(
    groups=GROUPS,
    slots=SLOTS,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    rule=RULES,
    spare=st.sampled_from([0, 1000, 1_000_000]),
    part_bytes=st.sampled_from([1, 300, 2000]),
)
def test_an_epoch_serves_each_row_at_most_once_and_all_but_a_part_of_a_batch_per_bucket(
    groups: list[tuple[str, int]],
    slots: tuple[int, int],
    seed: int,
    epoch: int,
    shuffle: bool,
    rule: str,
    spare: int,
    part_bytes: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_BYTES", part_bytes)
        least = 2 * slots[1] * 3 * 4000  # two windows of three buckets' largest row groups
        order = order_of(groups, *slots, seed=seed, shuffle=shuffle, rule=rule, window_bytes=least + spare)
        if order is not None:
            _check_epoch(order, groups, epoch)


def _check_epoch(order: Order, groups: list[tuple[str, int]], epoch: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        bucket, rows = global_batch(order, step)
        assert len(rows) == order.spec.batch_size
        assert {groups[group][0] for group, _ in rows} == {bucket}  # buckets are never mixed
        seen.update(rows)
    assert max(seen.values()) == 1
    assert all(0 <= row < groups[group][1] for group, row in seen)
    served = Counter(groups[group][0] for group, _ in seen)
    for bucket in order.layout.buckets:
        total = sum(rows for name, rows in groups if name == bucket)
        assert 0 <= total - served[bucket] < order.spec.batch_size


def test_the_rows_left_out_are_others_in_every_epoch() -> None:
    order = order_of([("64x64", 37)], 4, 8)
    assert order is not None
    left_out = []
    for epoch in range(20):
        _, rows = global_batch(order, epoch)
        left_out.append({row for _, row in rows} ^ set(range(37)))
    assert all(len(rows) == 5 for rows in left_out)
    assert set.union(*left_out) == set(range(37))


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=2, max_size=5).filter(any), shuffle=st.booleans())
def test_no_bucket_runs_ahead_of_or_behind_its_share(counts: list[int], shuffle: bool) -> None:
    groups = [(f"{64 + at}x64", 4 * count) for at, count in enumerate(counts) if count]
    order = order_of(groups, 1, 4, shuffle=shuffle)
    assert order is not None
    schedule, total = order.schedule(0), order.steps_per_epoch
    assert np.array_equal(np.bincount(schedule, minlength=len(groups)), order.batches)
    for steps in range(total + 1):
        share = order.batches * steps / total
        assert np.abs(np.bincount(schedule[:steps], minlength=len(groups)) - share).max() <= 1 + len(groups)


def test_epochs_seeds_and_lanes_are_shuffled_differently_and_shuffling_can_be_switched_off() -> None:
    groups = [("64x64", 32)] * 4
    batches = {}
    for seed in (1, 2):
        order = order_of(groups, 4, 2, seed=seed)
        assert order is not None
        for epoch in (0, 1):
            batches[seed, epoch] = tuple(global_batch(order, epoch * order.steps_per_epoch)[1])
    assert len(set(batches.values())) == 4
    plain = order_of(groups, 4, 2, shuffle=False)
    assert plain is not None
    assert global_batch(plain, 0)[1] == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("rule", [PARTS, ROW_GROUPS])
def test_a_window_mixes_the_rows_of_several_row_groups(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 400)
    order = order_of([("64x64", 16)] * 64, 4, 1, window_bytes=2 * 8 * 1600, rule=rule)
    assert order is not None
    groups = {group for step in range(8) for group, _ in global_batch(order, step)[1]}
    assert len(groups) >= 6


@pytest.mark.integration
@settings(deadline=None)
@given(
    groups=GROUPS,
    slots=SLOTS,
    spare=st.integers(0, 50_000),
    rule=RULES,
    part_bytes=st.sampled_from([100, 300, 1000]),
)
def test_two_windows_of_every_lane_and_bucket_fit_the_memory(
    groups: list[tuple[str, int]], slots: tuple[int, int], spare: int, rule: str, part_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_BYTES", part_bytes)
        _check_memory(groups, slots, spare, rule)


def _check_memory(groups: list[tuple[str, int]], slots: tuple[int, int], spare: int, rule: str) -> None:
    whole = order_of(groups, *slots)
    if whole is None:
        return
    layout, lanes = whole.layout, slots[1]
    served = np.flatnonzero(whole.batches)
    least = 2 * lanes * sum(int(layout.read_bytes[layout.bucket_of == bucket].max()) for bucket in served)
    order = order_of(groups, *slots, window_bytes=least + spare, rule=rule)
    assert order is not None
    held = 0
    for bucket in served.tolist():
        for lane in range(lanes):
            windows = list(order.windows(0, bucket, lane))
            # By the one rule whole row groups are held, by the other the rows of parts, of 100 bytes each.
            costs = [100 * window.num_rows for window in windows]
            if rule == ROW_GROUPS:
                costs = [sum(int(layout.read_bytes[piece.row_group]) for piece in w.pieces) for w in windows]
            held += 2 * max(costs)
    assert held <= least + spare
    with pytest.raises(ConfigError, match=f"allow {least} bytes"):
        order_of(groups, *slots, window_bytes=least - 1, rule=rule)


@pytest.mark.parametrize("rule", [PARTS, ROW_GROUPS])
def test_a_million_row_groups_are_ordered_at_once(rule: str) -> None:
    count = 1_000_000
    layout = Layout(("64x64",), np.zeros(count, np.int64), np.full(count, 500), np.full(count, 16 << 20))
    spec = OrderSpec(seed=1, batch_size=1024, lanes=64, window_bytes=64 << 30, rule=rule)
    order = Order(layout, spec)
    assert order.steps_per_epoch == 500 * count // 1024
    windows = order.windows(3, 0, 63)
    last = windows[len(windows) - 1]
    assert last.first_row + last.num_rows == order.steps_per_epoch * 16
    pieces = [len(windows[at].pieces) for at in range(1, len(windows) - 1)]
    # 512 MiB a window: 32 row groups, or as many parts as there may be, of which some lie in two row groups.
    assert set(pieces) == {32} if rule == ROW_GROUPS else min(pieces) >= 512 and max(pieces) < 600


# 1,281,167 latents of 8 KiB in row groups of 16 MiB, sorted into 1,000 classes: ImageNet at 256 px.
CLASSES, ROWS, ROWS_PER_GROUP = 1000, 1_281_167, 2048


def sorted_by_class() -> Layout:
    rows = np.full(-(-ROWS // ROWS_PER_GROUP), ROWS_PER_GROUP)
    rows[-1] = ROWS - ROWS_PER_GROUP * (len(rows) - 1)
    return Layout(("256x256",), np.zeros(len(rows), np.int64), rows, 8192 * rows)


def classes_of_batch(order: Order, step: int) -> int:
    """Distinct classes of a global batch of sorted rows."""
    epoch, before = order.served_before(step)
    rows = []
    for lane in range(order.spec.lanes):
        windows, row, wanted = order.windows(epoch, 0, lane), int(before[0]) * order.slot, order.slot
        while wanted:
            window = windows[windows.find(row)]
            laid_out = [ROWS_PER_GROUP * p.row_group + np.arange(p.start, p.stop) for p in window.pieces]
            taken = np.concatenate(laid_out)[window.permutation()][row - window.first_row :][:wanted]
            rows.append(taken)
            row, wanted = row + len(taken), wanted - len(taken)
    return len(np.unique(np.concatenate(rows) * CLASSES // ROWS))


@pytest.mark.parametrize("lanes", [8, 64])
def test_rows_sorted_by_class_are_mixed_with_the_default_settings(lanes: int) -> None:
    """A batch of 1,024 independent draws holds 641 of 1,000 classes; at least 0.9 of them, at 1 GiB a rank."""
    ideal = CLASSES * (1 - (1 - 1 / CLASSES) ** 1024)
    spec = OrderSpec(seed=3, batch_size=1024, lanes=lanes, window_bytes=(1 << 30) * lanes // 8)
    order, before = (Order(sorted_by_class(), replace(spec, rule=rule)) for rule in (PARTS, ROW_GROUPS))
    steps = [0, 1, 407, 800, 1250, 1251, 1700, 3 * 1251 + 600]
    assert np.mean([classes_of_batch(order, step) for step in steps]) >= 0.9 * ideal
    assert min(classes_of_batch(order, step) for step in steps) >= 0.85 * ideal
    if lanes == 8:
        assert np.mean([classes_of_batch(before, step) for step in steps]) < 0.2 * ideal


def test_windows_fit_also_where_chance_puts_many_larger_parts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a lane are here just those of twenty full windows, in parts of 31 or 32 rows."""
    full = 256 * 31 + 128
    monkeypatch.setattr(module, "PART_BYTES", full * 8192 // 256)
    rows = np.full(630, ROWS_PER_GROUP)
    assert rows.sum() == 8 * 20 * full
    layout = Layout(("256x256",), np.zeros(630, np.int64), rows, 8192 * rows)
    spec = OrderSpec(seed=3, batch_size=1024, lanes=8, window_bytes=2 * 8 * full * 8192)
    windows = list(Order(layout, spec).windows(0, 0, 5))
    assert len(windows[0].pieces) >= 256
    assert max(window.num_rows for window in windows) <= full


def test_neighbouring_windows_read_the_same_row_groups() -> None:
    """What else is read of a row group is kept for its next part: turns stay within about a row group."""
    count = 64_000
    rows = np.full(count, ROWS_PER_GROUP)
    layout = Layout(("256x256",), np.zeros(count, np.int64), rows, 8192 * rows)
    windows = Order(layout, OrderSpec(seed=3, batch_size=1024, lanes=8, window_bytes=1 << 30)).windows(0, 0, 5)
    assert len(windows) > 1900
    assert len(windows[100].pieces) >= 256
    # 64 parts are a row group, of some thirty in a track: its turns stay in two, and some parts lie in one more.
    used = {piece.row_group for at in range(100, 164) for piece in windows[at].pieces}
    assert len(used) < 4 * 256


def test_numbers_that_do_not_fit_together_are_refused() -> None:
    layout = plain_layout([("64x64", 10), ("64x96", 11)])
    with pytest.raises(ConfigError, match=r"lanes must divide batch_size=10[\s\S]*such as 5"):
        Order(layout, OrderSpec(seed=1, batch_size=10, lanes=8, window_bytes=1 << 20))
    with pytest.raises(ConfigError, match="the largest here holds 11"):
        Order(layout, OrderSpec(seed=1, batch_size=12, lanes=4, window_bytes=1 << 20))


def test_the_order_of_version_1_is_kept() -> None:
    """A state made by an older release must mean the same rows: change these values only with the version."""
    assert permutation(8, "row groups", 7, 0, "64x64").tolist() == PINNED_PERMUTATION
    groups = [("64x64", 20 + at) for at in range(6)] + [("64x96", 15 + at) for at in range(4)]
    assert pinned(Order(layout_of(MemoryRows(groups)), OrderSpec(7, 8, 4, 40_000, rule=ROW_GROUPS))) == PINNED_ORDER


def pinned(order: Order) -> str:
    rows = [global_batch(order, step) for step in range(2 * order.steps_per_epoch)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def test_the_order_of_parts_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of the rule that new streams follow: another order is another rule."""
    monkeypatch.setattr(module, "PART_BYTES", 700)
    groups = [("64x64", 20 + at) for at in range(6)] + [("64x96", 15 + at) for at in range(4)]
    assert pinned(Order(layout_of(MemoryRows(groups)), OrderSpec(7, 8, 4, 40_000))) == PINNED_PARTS


PINNED_PERMUTATION = [4, 5, 3, 0, 7, 2, 6, 1]
PINNED_ORDER = "41ea9dc7f2074b16"
PINNED_PARTS = "888c6ceae786cb31"
