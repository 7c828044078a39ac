"""The plan: units of one shape, stable under added requests, and exactly the open rows to be drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.samplers import padded
from pipeline.sample.plan import PLAN_SCHEMA, extend_plan, planned_rows, unit_tables
from pipeline.sample.requests import Defaults, RequestLimits, shape_groups, validate_requests
from pipeline.store.ledger.rowset import RowSet

ONE_SHAPE = ("height", "width", "steps", "guidance", "guidance_low", "guidance_high")
LIMITS = RequestLimits(num_classes=5, takes_text=False, multiple=4, sizes=((32, 32), (32, 64)))
rows = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 30), st.sampled_from([32, 64]), st.sampled_from([1.0, 2.0])),
    min_size=1,
    max_size=40,
    unique=True,
)


def requests(chosen: list[tuple[int, int, int, float]]) -> pa.Table:
    label, seed, width, guidance = zip(*chosen, strict=True)
    columns: dict[str, Any] = {"label": label, "seed": seed, "width": width, "guidance": guidance}
    return validate_requests(columns, limits=LIMITS, defaults=Defaults()).table


@given(rows, st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_a_plan_holds_every_request_once_in_units_of_one_shape(
    chosen: list[tuple[int, int, int, float]], size: int
) -> None:
    asked = requests(chosen)
    plan = extend_plan(None, asked, size)
    assert plan.schema == PLAN_SCHEMA
    assert sorted(plan["request_id"].to_pylist()) == sorted(asked["request_id"].to_pylist())
    for number, (unit, table) in enumerate(unit_tables(plan, planned_rows(plan))):
        assert unit == number
        assert table["row"].to_pylist() == list(range(table.num_rows))
        assert table.num_rows <= size
        assert len({tuple(r[k] for k in ONE_SHAPE) for r in table.to_pylist()}) == 1
    assert planned_rows(plan).count() == asked.num_rows


@given(rows, rows, st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_added_requests_move_no_planned_row(
    first: list[tuple[int, int, int, float]], second: list[tuple[int, int, int, float]], size: int
) -> None:
    plan = extend_plan(None, requests(first), size)
    both = requests(list(dict.fromkeys([*second, *first])))
    added = extend_plan(plan, both, size)
    new = set(both["request_id"].to_pylist()) - set(plan["request_id"].to_pylist())
    assert set(added["request_id"].to_pylist()) == new
    assert not planned_rows(plan) & planned_rows(added)
    assert extend_plan(pa.concat_tables([plan, added]), both, size).num_rows == 0


@given(rows, st.integers(1, 9), st.data())
@settings(max_examples=80, deadline=None)
def test_only_wanted_and_open_rows_are_drawn(
    chosen: list[tuple[int, int, int, float]], size: int, data: st.DataObject
) -> None:
    plan = extend_plan(None, requests(chosen), size)
    names = plan["request_id"].to_pylist()
    wanted = data.draw(st.lists(st.sampled_from(names), unique=True))
    done = data.draw(st.lists(st.sampled_from(range(len(names))), unique=True))
    covered = RowSet.from_rows(plan["unit"].to_numpy()[done], plan["row"].to_numpy()[done])
    pending = planned_rows(plan, wanted) - covered
    drawn = [name for _, table in unit_tables(plan, pending) for name in table["request_id"].to_pylist()]
    assert sorted(drawn) == sorted(set(wanted) - {names[i] for i in done})


def test_the_order_of_a_group_is_the_order_asked_for() -> None:
    asked = requests([(3, 1, 32, 1.0), (0, 9, 64, 1.0), (1, 1, 32, 1.0)])
    assert [asked["label"].take(pa.array(g)).to_pylist() for g in shape_groups(asked)] == [[3, 1], [0]]
    assert list(shape_groups(asked.slice(0, 0))) == []


@given(st.integers(1, 50), st.integers(1, 9))
def test_padded_batches_have_one_size_and_lose_nothing(count: int, batch_size: int) -> None:
    indices = np.arange(100, 100 + count)
    batches = list(padded(indices, batch_size))
    assert all(len(batch) == batch_size for batch, _ in batches)
    assert np.concatenate([batch[:real] for batch, real in batches]).tolist() == indices.tolist()


def test_equal_prompts_of_one_shape_come_together_and_ids_stay() -> None:
    limits = RequestLimits(num_classes=None, takes_text=True, multiple=4, sizes=((32, 32),))
    prompts = ["b", "a", "c"] * 4
    columns: dict[str, Any] = {"prompt": prompts, "seed": [i // 3 for i in range(12)]}
    asked = validate_requests(columns, limits=limits, defaults=Defaults()).table
    plan = extend_plan(None, asked, 4)
    assert plan["prompt"].to_pylist() == ["b"] * 4 + ["a"] * 4 + ["c"] * 4
    assert plan["seed"].to_pylist() == [0, 1, 2, 3] * 3
    assert set(plan["request_id"].to_pylist()) == set(asked["request_id"].to_pylist())
    # What is planned stays where it is, whatever is added; a plan in the old order holds as well.
    old = pa.table(
        [pa.array([0] * 6), pa.array(range(6)), *asked.slice(0, 6).columns],
        schema=PLAN_SCHEMA,
    )
    added = extend_plan(old, asked, 4)
    assert added["prompt"].to_pylist() == ["b", "b", "a", "a", "c", "c"]
    assert min(added["unit"].to_pylist()) == 1


def test_an_empty_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="unit_requests 0"):
        extend_plan(None, requests([(1, 1, 32, 1.0)]), 0)
