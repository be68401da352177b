from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.errors import FileFormatError, PlanError, PrecisionError
from fxmpq.solver.plan import Plan, choices_of

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(max_size=8)
choices = st.dictionaries(names, st.sampled_from(["w2a8", "w4a8", "w8", "fp32"]), min_size=1)
totals = st.dictionaries(names, finite | st.integers(0, 10**18), max_size=3)
plans = st.builds(
    Plan,
    choices,
    layers=st.dictionaries(names, st.just("w4a8"), max_size=3),
    target=st.none() | names,
    budget=st.none() | names,
    method=st.none() | names,
    fingerprint=st.none() | names,
    loss=st.none() | finite,
    costs=totals,
    relative=totals,
    gap=st.none() | finite,
    bound=st.none() | finite,
    status=st.sampled_from([None, "optimal", "feasible"]),
    seconds=st.none() | finite,
)


@given(plans)
def test_json_round_trip_is_exact(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_edited_by_hand_needs_its_choices_only(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = Plan({"conv1": "w4a8"}, fingerprint="abc", costs={"weights": 7})
    text = plan.to_json(path)
    path.write_text(text.replace('"w4a8"', '"W8A8"'))
    assert Plan.from_json(path).choices == {"conv1": "w8a8"}
    bare = '{"schema": "fxmpq.plan", "version": 1, "choices": {"conv1": "w2a8"}}'
    assert Plan.from_json(bare) == Plan({"conv1": "w2a8"})


@pytest.mark.parametrize(
    ("loss", "decibels"), [(None, None), (0.001, 30.0), (10.0, -10.0), (0.0, math.inf)]
)
def test_predicted_sqnr(loss: float | None, decibels: float | None) -> None:
    found = Plan({"a": "w8a8"}, loss=loss).sqnr_db
    assert found == (decibels if decibels is None else pytest.approx(decibels))


def test_another_models_graph_is_refused() -> None:
    plan = Plan({"a": "w8a8"}, fingerprint="1f00ba11")
    plan.check("1f00ba11")
    with pytest.raises(PlanError, match=r"1f00ba11.*deadbeef.*apply\(graph, plan\.choices\)"):
        plan.check("deadbeef")


def test_a_plan_without_fingerprint_fits_any_graph() -> None:
    plan = Plan({"a": "w8a8"})
    plan.check("deadbeef")
    assert plan.fingerprint is None


def test_a_plan_keeps_its_own_copy() -> None:
    given_choices, given_costs = {"a": "w8a8"}, {"weights": 1.0}
    plan = Plan(given_choices, costs=given_costs)
    given_choices["a"], given_costs["weights"] = "w2a8", 9.0
    assert (plan.choices, plan.costs) == ({"a": "w8a8"}, {"weights": 1.0})


def test_nothing_chosen_is_refused() -> None:
    with pytest.raises(PlanError, match="a precision for at least one group"):
        Plan({})


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(PrecisionError, match="cannot read the precision 'int8'"):
        Plan({"a": "int8"})


@pytest.mark.parametrize("name", ["loss", "gap", "bound", "seconds"])
@pytest.mark.parametrize("value", [math.nan, math.inf, "3"])
def test_a_number_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=f"{name} of a plan is {value!r}; give a finite number"):
        Plan({"a": "w8a8"}, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "fxmpq.costs"}, "expected the schema 'fxmpq.plan'; found 'fxmpq.costs'"),
        ({"version": 7}, "expected version 1 .* found 7"),
        ({"colour": 1}, r"unknown fields \['colour'\]"),
        ({"loss": math.nan}, "NaN"),
        ({"loss": "small"}, "loss of a plan is 'small'"),
        ({"costs": {"weights": "big"}}, r"costs\['weights'\] of a plan is 'big'"),
        ({"costs": 3}, "fxmpq.plan: "),
        ({"layers": 3}, "fxmpq.plan: "),
        ({"choices": {}}, "at least one group"),
        ({"choices": {"a": "w9a8"}}, "no 9-bit"),
        ({"choices": {"a": 4}}, "fxmpq.plan: "),
        ({"choices": ["w4a8"]}, "fxmpq.plan: "),
    ],
)
def test_a_file_that_holds_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    found = json.loads(Plan({"a": "w8a8"}).to_json())
    with pytest.raises(FileFormatError, match=message):
        Plan.from_json(json.dumps(found | changes))


def test_a_file_without_choices_is_refused() -> None:
    with pytest.raises(FileFormatError, match=r"missing fields \['choices'\]"):
        Plan.from_json('{"schema": "fxmpq.plan", "version": 1}')


@pytest.mark.parametrize("unit", ["loss", "score"])
def test_only_a_noise_power_has_decibels(unit: str) -> None:
    assert Plan({"a": "w8a8"}, loss=0.01, unit=unit).sqnr_db is None
    assert Plan({"a": "w8a8"}, loss=0.01).sqnr_db == pytest.approx(20)
    with pytest.raises(PlanError, match="no unit 'nats' of a loss; there are noise, loss, score"):
        Plan({"a": "w8a8"}, unit="nats")


def test_choices_are_a_plans_own_or_bare_ones() -> None:
    plan = Plan({"a": "w4a8"}, fingerprint="this")
    assert choices_of(plan, "this") == choices_of({"a": "w4a8"}, "that") == {"a": "w4a8"}
    with pytest.raises(PlanError, match="fingerprint this"):
        choices_of(plan, "that")


def test_what_is_no_plan_is_refused_in_few_words() -> None:
    for wrong in ([torch.ones(9, 9)], torch.ones(9), "plan.json"):
        with pytest.raises(PlanError, match="behind the graph, in front of any batches") as refused:
            choices_of(wrong, "this")
        assert f"found a {type(wrong).__name__}" in str(refused.value)
        assert len(str(refused.value)) < 200
