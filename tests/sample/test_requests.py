"""Requests: what is accepted, how it is named, and that every problem is told at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.diffusion.solvers import COMBINATIONS, Combination
from pipeline.errors import InputError
from pipeline.sample.requests import (
    REQUEST_SCHEMA,
    Defaults,
    RequestLimits,
    grid_columns,
    request_id,
    validate_requests,
)

LIMITS = RequestLimits(num_classes=12, takes_text=False, multiple=4, sizes=((32, 32), (32, 64)))
TEXT = RequestLimits(num_classes=None, takes_text=True, multiple=8, sizes=((64, 64),))


def check(columns: dict[str, list[Any]], limits: RequestLimits = LIMITS, **options: Any) -> Any:
    return validate_requests(columns, limits=limits, defaults=options.pop("defaults", Defaults()), **options)


request_rows = st.fixed_dictionaries(
    {
        "label": st.integers(0, 11),
        "seed": st.integers(0, 2**63 - 1),
        "width": st.sampled_from([32, 64]),
        "steps": st.integers(1, 1000),
        "guidance": st.floats(0, 100),
    }
)


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


@given(st.lists(request_rows, min_size=1, max_size=20), st.randoms())
@settings(max_examples=60, deadline=None)
def test_names_follow_the_content_and_not_the_place(rows: list[dict[str, Any]], random: Any) -> None:
    straight = check(as_columns(rows), keep_first=True).table
    shuffled = list(rows)
    random.shuffle(shuffled)
    other = check(as_columns(shuffled), keep_first=True).table
    assert sorted(straight.to_pylist(), key=lambda r: r["request_id"]) == sorted(
        other.to_pylist(), key=lambda r: r["request_id"]
    )
    assert straight.schema == REQUEST_SCHEMA
    assert all(request_id(row) == row["request_id"] for row in straight.to_pylist())


@given(st.lists(request_rows, min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_every_row_is_kept_or_counted_as_repeated(rows: list[dict[str, Any]]) -> None:
    found = check(as_columns(rows + rows), keep_first=True)
    assert found.table.num_rows + found.duplicates == 2 * len(rows)
    assert found.duplicates >= len(rows)
    names = found.table["request_id"].to_pylist()
    assert len(set(names)) == len(names)


def test_a_name_never_changes() -> None:
    row = {"label": 3, "seed": 7, "height": 32, "width": 32, "steps": 25, "guidance": 2.0}
    assert request_id(row).hex() == "b908dee9e6f5566d7d653ef3d4c800b3"
    assert request_id({**row, "prompt": None, "extra": "{}"}) == request_id(row)


@pytest.mark.parametrize(
    ("field", "value"),
    [("label", 4), ("seed", 8), ("height", 64), ("width", 64), ("steps", 26), ("guidance", 2.5), ("prompt", "a")],
)
def test_every_field_is_part_of_the_name(field: str, value: Any) -> None:
    row = {"label": 3, "seed": 7, "height": 32, "width": 32, "steps": 25, "guidance": 2.0}
    assert request_id({**row, field: value}) != request_id(row)


def test_what_means_the_same_has_one_name() -> None:
    whole, none = check(
        {"label": [1, 2], "guidance": [3, 1], "guidance_low": [0, 0.2], "guidance_high": [1.0, 0.5]}
    ).table.to_pylist()
    assert (whole["guidance_low"], whole["guidance_high"]) == (None, None)
    assert (none["guidance_low"], none["guidance_high"]) == (None, None)
    assert whole["request_id"] == check({"label": ["1"], "guidance": ["3.0"]}).table["request_id"][0].as_py()


def test_defaults_fill_what_a_row_leaves_open() -> None:
    defaults = Defaults(seed=5, width=64, steps=9, guidance=2.0, guidance_interval=(0.1, 0.8))
    row = check({"label": [1]}, defaults=defaults).table.to_pylist()[0]
    assert {k: row[k] for k in ("seed", "height", "width", "steps", "guidance")} == {
        "seed": 5,
        "height": 32,
        "width": 64,
        "steps": 9,
        "guidance": 2.0,
    }
    assert (row["guidance_low"], row["guidance_high"]) == (0.1, 0.8)
    half_open = check({"label": [1], "guidance": [2], "guidance_low": [0.3]}).table.to_pylist()[0]
    assert (half_open["guidance_low"], half_open["guidance_high"]) == (0.3, 1.0)


def test_large_seeds_keep_every_digit() -> None:
    seeds = [2**63 - 1, str(2**62 + 1), "12"]
    assert check({"label": [0, 0, 0], "seed": seeds}).table["seed"].to_pylist() == [2**63 - 1, 2**62 + 1, 12]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [12]}, r"row 1: label 12: the model has classes 0 to 11"),
        ({"label": [-1]}, r"label -1: the model has classes"),
        ({"label": ["cat"]}, r"row 1: label 'cat': not a number"),
        ({"label": [1.5]}, r"label 1.5: not a whole number"),
        ({"label": [True]}, r"label True: not a number"),
        ({"label": [1], "seed": [-1]}, r"seed -1: a seed is from 0"),
        ({"label": [1], "seed": [2**63]}, r"a seed is from 0 to 2\^63 - 1"),
        ({"label": [1], "seed": [10**400]}, r"not a number"),
        ({"label": [1], "steps": [0]}, r"steps 0: from 1 to 1000"),
        ({"label": [1], "guidance": [float("nan")]}, r"guidance nan: not a finite number"),
        ({"label": [1], "guidance": [-2]}, r"guidance -2.0: from 0"),
        ({"label": [1], "guidance": [2], "guidance_low": [0.9], "guidance_high": [0.1]}, r"0 <= low < high <= 1"),
        ({"label": [1], "height": [30]}, r"height 30: a multiple of 4"),
        ({"label": [1], "height": [64]}, r"size 64x32: the model was trained on 32x32, 32x64"),
        ({"label": [None], "guidance": [2]}, r"guidance 2.0 without a label or prompt"),
        ({"prompt": ["a cat"]}, r"prompt 'a cat': the model was trained without text"),
        ({"label": [1], "negative_prompt": ["x"]}, r"negative_prompt without a prompt"),
        ({"label": [1], "extra": ["x" * 20000]}, r"extra takes 20002 bytes"),
        ({"prompt": ["\ud800"]}, r"not valid Unicode"),
        ({"prompt": [7]}, r"prompt 7: not a text"),
        ({"label": [1, 1]}, r"row 2: asks for the same image as row 1"),
        ({}, r"There are no requests in requests"),
        ({"label": []}, r"There are no requests"),
    ],
)
def test_refused_requests_name_row_value_and_rule(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(columns)


def test_models_without_classes_or_sizes() -> None:
    with pytest.raises(InputError, match="label 1: the model was trained without classes"):
        check({"label": [1]}, TEXT)
    nameless = RequestLimits(num_classes=None, takes_text=False, multiple=8, sizes=())
    with pytest.raises(InputError, match="height is not set and the model names no size"):
        check({"seed": [1]}, nameless)
    free = RequestLimits(num_classes=None, takes_text=False, multiple=8, sizes=((64, 64),), any_size=True)
    assert check({"seed": [1], "height": [128]}, free).table["height"].to_pylist() == [128]


def test_all_problems_are_told_at_once_and_the_list_ends_somewhere() -> None:
    with pytest.raises(InputError) as caught:
        check({"label": [1, 99, 3], "seed": ["x", 1, -2], "steps": [1, 0, 1]})
    text = str(caught.value)
    for part in (
        "row 1: seed 'x'",
        "row 2: label 99",
        "row 2: steps 0",
        "row 3: seed -2",
        "4 problem(s) in 3 row(s)",
    ):
        assert part in text
    with pytest.raises(InputError) as caught:
        check({"label": ["cat", 99], "steps": [0, 1], "guidance": [2.0, "much"], "guidance_low": [0.9, 0.9]})
    told = [line.strip("- ") for line in str(caught.value).splitlines() if "- row" in line]
    # What a cell that cannot be read might have meant is no reason for a complaint about another.
    assert [line.split(":")[1] for line in told] == [" label 'cat'", " steps 0", " guidance 'much'", " label 99"]
    with pytest.raises(InputError, match="and 160 more"):
        check({"label": [99] * 200})


def test_the_grid_is_conditions_times_seeds() -> None:
    columns = grid_columns(labels=[2, 0], prompts=[], negative_prompt=None, seeds=[5, 6, 7])
    table = check(columns).table
    assert table["label"].to_pylist() == [2, 2, 2, 0, 0, 0]
    assert table["seed"].to_pylist() == [5, 6, 7, 5, 6, 7]
    texts = check(grid_columns(labels=None, prompts=["a", "b"], negative_prompt="c", seeds=[0]), TEXT).table
    assert texts["prompt"].to_pylist() == ["a", "b"]
    assert texts["negative_prompt"].to_pylist() == ["c", "c"]
    assert check(grid_columns(labels=None, prompts=[], negative_prompt=None, seeds=[1, 2])).table.num_rows == 2


def test_a_model_without_a_label_for_none_takes_labels_and_no_guidance() -> None:
    limits = replace(LIMITS, combinations=("class",))
    assert check({"label": [0, 2]}, limits).table.num_rows == 2
    told = r"row 1: asks for neither label nor prompt: [^\n]*\n  - row 2: guidance 2\.0 leads away[^\n]*so 1 only"
    with pytest.raises(InputError, match=told):
        check({"label": [None, 1], "guidance": [1.0, 2.0]}, limits)


BOTH = RequestLimits(num_classes=3, takes_text=True, multiple=8, sizes=((64, 64),))
ASKED: dict[Combination, dict[str, Any]] = {
    "class+text": {"label": [1], "prompt": ["a"]},
    "class": {"label": [1]},
    "text": {"prompt": ["a"]},
    "none": {"seed": [1]},
}


@pytest.mark.parametrize("trained", COMBINATIONS)
def test_what_was_not_trained_is_refused(trained: Combination) -> None:
    limits = replace(BOTH, combinations=(trained,))
    for asked, columns in ASKED.items():
        assert check(columns, BOTH).table.num_rows == 1
        if asked == trained:
            assert check(columns, limits).table.num_rows == 1
        else:
            with pytest.raises(
                InputError, match=r"row 1: asks for .*: the model was trained on .*, and draws no other"
            ):
                check(columns, limits)


def test_an_empty_prompt_is_no_prompt() -> None:
    assert check({"label": [1], "prompt": [""]}, replace(BOTH, combinations=("class",))).table.num_rows == 1
    with pytest.raises(InputError, match="asks for label without prompt"):
        check({"label": [1], "prompt": [""]}, replace(BOTH, combinations=("class+text",)))


def test_guidance_leads_away_from_what_was_trained() -> None:
    asked = {"label": [1], "prompt": ["a"], "guidance": [2.0]}
    away_from_none = replace(BOTH, combinations=("class+text", "none"))
    assert check(asked, away_from_none).table.num_rows == 1
    # A negative prompt without the label: that is text alone.
    with pytest.raises(InputError, match=r"guidance 2\.0 leads away from prompt without label"):
        check({**asked, "negative_prompt": ["b"]}, away_from_none)
    away_from_text = replace(BOTH, combinations=("class+text", "text"))
    assert check({**asked, "negative_prompt": ["b"]}, away_from_text).table.num_rows == 1
    with pytest.raises(InputError, match=r"guidance 2\.0 leads away from neither label nor prompt"):
        check(asked, away_from_text)
    assert check({**asked, "guidance": [1.0]}, away_from_text).table.num_rows == 1


def test_the_grid_of_classes_and_prompts_is_every_one_with_every_other() -> None:
    columns = grid_columns(labels=[2, 0], prompts=["a", "b"], negative_prompt="c", seeds=[5, 6])
    rows = check(columns, BOTH).table.to_pylist()
    assert [(row["label"], row["prompt"], row["seed"]) for row in rows] == [
        (label, prompt, seed) for label in (2, 0) for prompt in ("a", "b") for seed in (5, 6)
    ]
    assert {row["negative_prompt"] for row in rows} == {"c"}
