from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Moment
from fxmpq.errors import FxmpqError
from fxmpq.journal import Journal
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.flip_search import SEARCHES, flip_curve, flipped, search_flips
from fxmpq.solver.greedy import Flip, baseline, flips, lowering
from fxmpq.work import Work

# The example that AIMET tests its search with: scores of one group at a time, and of both. The
# sensitivity is what a score misses of 1; at the baseline it is 0.
SCORES = {"g1": {"w16a8": 0.93, "w8a16": 0.94}, "g2": {"w16a8": 0.90, "w8a16": 0.91}}
MEASURED = {
    ("w16a16", "w16a16"): 1.0,
    ("w8a16", "w16a16"): 0.94,
    ("w16a8", "w16a16"): 0.93,
    ("w16a8", "w8a16"): 0.89,
    ("w16a8", "w16a8"): 0.85,
}
ORACLE = Sensitivity(
    {
        group: {"w16a16": 0.0, **{name: 1 - score for name, score in row.items()}}
        for group, row in SCORES.items()
    }
)
BITS = ("w16a16", "w8a16", "w16a8")
BOPS = CostTable(
    {"bops": {group: dict(zip(BITS, (256, 128, 128), strict=True)) for group in SCORES}}
)
# Where 8-bit activations cost less than 8-bit weights, no entry of the list goes back up.
TRAFFIC = CostTable(
    {"traffic": {group: dict(zip(BITS, (48, 40, 32), strict=True)) for group in SCORES}}
)


def measured(choices: dict[str, str]) -> float:
    return MEASURED[choices["g1"], choices["g2"]]


def test_the_oracle_s_list_is_sorted_by_score() -> None:
    found = flips(ORACLE, BOPS, "bops")
    entries = [(flip.groups[0], flip.precision, round(1 - flip.loss, 12)) for flip in found]
    assert entries == [
        ("g1", "w8a16", 0.94),
        ("g1", "w16a8", 0.93),
        ("g2", "w8a16", 0.91),
        ("g2", "w16a8", 0.90),
    ]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("target", "index"), [(0.90, 1), (0.86, 2)])
@pytest.mark.parametrize(("table", "monotone"), [(BOPS, False), (TRAFFIC, False), (TRAFFIC, True)])
def test_the_oracle_s_targets(
    search: str, target: float, index: int, table: CostTable, monotone: bool
) -> None:
    (metric,) = table.metrics
    found = search_flips(
        flips(ORACLE, table, metric),
        measured,
        target,
        search,
        baseline=baseline(ORACLE, table, metric),
        monotone=monotone,
    )
    # An index counts from the first flip, and a count from the baseline.
    assert found.count == index + 1
    assert found.met
    assert found.score == [0.94, 0.93, 0.89, 0.85][index]
    assert found.choices == {"g1": "w16a8", "g2": ["w16a16", "w8a16"][index - 1]}
    if search == "brute":
        seen = [0.94, 0.93, 0.89, 0.85][: index + 2]
        assert list(found.scores.items()) == list(enumerate([1.0, *seen]))


def test_the_guard_skips_the_oracle_s_flips_that_save_no_bops() -> None:
    found = flips(ORACLE, BOPS, "bops")
    kept = lowering(found)
    assert [(flip.groups[0], flip.precision) for flip in kept] == [("g1", "w8a16"), ("g2", "w8a16")]
    published = flip_curve(ORACLE, BOPS, "bops", monotone=False, evaluate=measured)
    assert [point.score for point in published] == [1.0, 0.94, 0.93, 0.89, 0.85]
    assert [point.relative for point in published] == [1.0, 0.75, 0.75, 0.5, 0.5]
    guarded = flip_curve(ORACLE, BOPS, "bops")
    assert [point.relative for point in guarded] == [1.0, 0.75, 0.5]
    # At 0.94 the guarded list stops after its first flip, whatever the second would score.
    answer = search_flips(
        found,
        lambda choices: 0.0 if choices["g2"] == "w8a16" else measured(choices),
        0.94,
        baseline=baseline(ORACLE, BOPS, "bops"),
    )
    assert (answer.count, answer.choices) == (1, {"g1": "w8a16", "g2": "w16a16"})


def chain(length: int) -> tuple[list[Flip], dict[str, str]]:
    """One flip a group."""
    found = [Flip((f"g{n}",), "w4a8", float(n), 12, 1) for n in range(length)]
    return found, {f"g{n}": "w8a8" for n in range(length)}


def by_count(scores: list[float]) -> Callable[[dict[str, str]], float]:
    return lambda choices: scores[list(choices.values()).count("w4a8")]


numbers = st.one_of(
    st.integers(-5, 5).map(float),
    st.floats(-1e3, 1e3),
    st.sampled_from([math.inf, -math.inf, 1e308, -1e308]),
)


@given(
    scores=st.lists(numbers, min_size=1, max_size=200).map(lambda s: sorted(s, reverse=True)),
    target=numbers,
)
def test_all_searches_agree_on_monotone_curves_and_evaluate_few_points(
    scores: list[float], target: float
) -> None:
    found, start = chain(len(scores) - 1)
    expected = max((k for k, score in enumerate(scores) if score >= target), default=0)
    for search in SEARCHES:
        answer = search_flips(found, by_count(scores), target, search, baseline=start)
        assert (answer.count, answer.met) == (expected, scores[0] >= target)
        assert answer.score == scores[expected]
        assert answer.choices == flipped(start, found[:expected])
        assert answer.scores == {count: scores[count] for count in answer.scores}
        evaluated = len(answer.scores) - 1
        if search == "binary":
            assert evaluated <= math.ceil(math.log2(len(scores)))
        if search == "interpolation":
            assert evaluated <= 2 * math.log2(max(len(scores) - 1, 1)) + 2


def test_interpolation_of_a_straight_curve_takes_a_few_evaluations() -> None:
    found, start = chain(1000)
    scores = [90.0 - 0.01 * count for count in range(1001)]
    for target in (89.0, 85.123, 80.5):
        answer = search_flips(found, by_count(scores), target, "interpolation", baseline=start)
        assert answer.count == max(k for k, score in enumerate(scores) if score >= target)
        assert len(answer.scores) <= 5
        binary = search_flips(found, by_count(scores), target, "binary", baseline=start)
        assert len(binary.scores) >= 10


def test_a_baseline_that_misses_the_target_is_returned_after_one_evaluation() -> None:
    found, start = chain(5)
    for search in SEARCHES:
        answer = search_flips(
            found, lambda choices: 0.5, 0.6, search, baseline=start, cheapest=start
        )
        assert (answer.choices, answer.count, answer.met) == (start, 0, False)
        assert answer.scores == {0: 0.5}


def test_the_cheapest_choices_are_taken_if_they_meet_the_target() -> None:
    found, start = chain(3)
    least = dict.fromkeys(start, "w2a8")

    def score(choices: dict[str, str]) -> float:
        return 0.7 if choices == least else 0.9 - 0.1 * list(choices.values()).count("w4a8")

    answer = search_flips(found, score, 0.65, baseline=start, cheapest=least)
    assert (answer.choices, answer.count, answer.score, answer.met) == (least, None, 0.7, True)
    assert answer.scores == {0: 0.9, -1: 0.7}
    answer = search_flips(found, score, 0.75, baseline=start, cheapest=least)
    assert (answer.count, answer.score) == (1, 0.8)
    assert answer.scores[-1] == 0.7


def test_no_flips_leave_the_baseline() -> None:
    for search in SEARCHES:
        answer = search_flips([], lambda choices: 0.9, 0.8, search, baseline={"a": "w8a8"})
        assert (answer.choices, answer.count, answer.met) == ({"a": "w8a8"}, 0, True)


def test_the_curve_adds_fixed_costs_and_predicts_the_summed_loss() -> None:
    sensitivity = Sensitivity(
        {"a": {"w8a8": 0.125, "w4a8": 0.5}, "b": {"w8a8": 0.25, "w4a8": 1.0, "w2a8": 4.0}}
    )
    size = {"a": {"w8a8": 8, "w4a8": 4}, "b": {"w8a8": 80, "w4a8": 40, "w2a8": 20}}
    table = CostTable({"weights": size}, fixed={"weights": 12})
    curve = flip_curve(sensitivity, table, "weights")
    assert [(point.count, point.cost, point.relative, point.loss) for point in curve] == [
        (0, 100, 1.0, 0.375),
        (1, 96, 0.96, 0.75),
        (2, 56, 0.56, 1.5),
        (3, 36, 0.36, 4.5),
    ]
    assert [point.flip.groups if point.flip else None for point in curve] == [
        None,
        ("a",),
        ("b",),
        ("b",),
    ]
    assert {point.score for point in curve} == {None}
    tied = flip_curve(sensitivity, table, "weights", ties=[["a", "b"]])
    assert [point.cost for point in tied] == [100, 56]


def test_a_long_curve_ends_exactly_at_the_smallest_cost() -> None:
    bits = (2, 3, 4, 6, 8)
    groups = [f"g{index}" for index in range(400)]
    values = {g: {f"w{b}a8": 4.0**-b * (n + 1) for b in bits} for n, g in enumerate(groups)}
    size = {g: {f"w{b}a8": b * 0.1 * (n + 1) for b in bits} for n, g in enumerate(groups)}
    table = CostTable({"seconds": size})
    curve = flip_curve(Sensitivity(values), table, "seconds")
    assert len(curve) == 1 + 4 * len(groups)
    assert curve[-1].cost == pytest.approx(table.smallest("seconds"), rel=1e-14)
    assert curve[-1].loss == pytest.approx(math.fsum(row["w2a8"] for row in values.values()))
    costs = [point.cost for point in curve]
    assert costs == sorted(costs, reverse=True)


def test_a_curve_of_a_cost_that_is_zero_everywhere() -> None:
    sensitivity = Sensitivity({"a": {"w8a8": 0.0, "w4a8": 0.5}})
    curve = flip_curve(sensitivity, CostTable({"macs": {"a": {"w8a8": 0, "w4a8": 0}}}), "macs")
    assert [(point.cost, point.relative) for point in curve] == [(0, 1.0)]


def test_a_curve_is_of_a_cost_that_is_a_sum_over_groups() -> None:
    size = {"a": {"w8a8": 8, "w4a8": 4}}
    table = CostTable({"weights": size}, moments={"peak": [Moment("n", 0, size)]})
    sensitivity = Sensitivity({"a": {"w8a8": 0.0, "w4a8": 0.5}})
    with pytest.raises(FxmpqError, match="'peak' is a peak, the largest of 1 moments"):
        flip_curve(sensitivity, table, "peak")


def test_the_curve_and_the_search_go_on_from_a_journal(tmp_path: Path) -> None:
    calls: list[tuple[str, ...]] = []

    def counted(choices: dict[str, str]) -> float:
        calls.append(tuple(choices.values()))
        return measured(choices)

    def work() -> Work:
        return Work(journal=Journal(tmp_path / "flips.journal", {"run": 1}))

    found, start = flips(ORACLE, BOPS, "bops"), baseline(ORACLE, BOPS, "bops")
    options = {"baseline": start, "monotone": False}
    search_flips(found, counted, 0.9, work=work(), **options)  # type: ignore[arg-type]
    assert len(calls) == 3
    curve = flip_curve(ORACLE, BOPS, "bops", monotone=False, evaluate=counted, work=work())
    assert [point.score for point in curve] == [1.0, 0.94, 0.93, 0.89, 0.85]
    assert len(calls) == 5
    assert len(set(calls)) == 5


def test_evaluate_cannot_change_the_choices() -> None:
    found, start = chain(4)

    def spoil(choices: dict[str, str]) -> float:
        count = list(choices.values()).count("w4a8")
        choices.clear()
        return -count

    answer = search_flips(found, spoil, -2, baseline=start)
    assert answer.choices == flipped(start, found[:2])
    assert start == {f"g{n}": "w8a8" for n in range(4)}


def test_bad_requests_are_refused_before_anything_is_evaluated() -> None:
    found, start = chain(2)

    def never(choices: dict[str, str]) -> float:
        raise AssertionError("evaluated")

    with pytest.raises(FxmpqError, match="no search 'fast'; there are 'brute', 'binary'"):
        search_flips(found, never, 0.5, "fast", baseline=start)
    with pytest.raises(FxmpqError, match="the target score is NaN"):
        search_flips(found, never, math.nan, baseline=start)
    with pytest.raises(
        FxmpqError, match="sets group 'g1', which the baseline lacks; closest: 'g0'"
    ):
        search_flips(found, never, 0.5, baseline={"g0": "w8a8"})
    with pytest.raises(FxmpqError, match="the score of the choices .*'w8a8'.* is NaN"):
        search_flips(found, lambda choices: math.nan, 0.5, baseline=start)
    with pytest.raises(FxmpqError, match="is NaN"):
        flip_curve(ORACLE, BOPS, "bops", evaluate=lambda choices: math.nan)
