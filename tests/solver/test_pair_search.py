from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmpq.errors import BudgetError
from fxmpq.solver import pair_search as module
from fxmpq.solver.branch import Branched
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.pair_search import find_either, find_paired_optimum
from fxmpq.solver.pairs import Pair, PairedInstance
from fxmpq.solver.search import Found, Start, find_optimum

from .conftest import draw_groups, draw_pairs, every_choice

SOLVERS = ("cbc", "highs")


@st.composite
def programs(draw: st.DrawFn) -> PairedInstance:
    """Small, with values of one size or spread over many orders of magnitude."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    rows = draw(st.integers(0, 2))
    cost = draw(st.sampled_from([st.integers(0, 5), st.integers(0, 10**6)]))
    value = draw(
        st.sampled_from(
            [st.integers(-3, 9), st.integers(0, 12).map(lambda power: 10**power), st.just(0)]
        )
    )
    groups = draw_groups(draw, sizes, rows, value=value, cost=cost)
    pairs = draw_pairs(draw, groups, st.tuples(value, *[cost for _ in range(rows)]), most=4)
    shares = [draw(st.floats(0, 1)) for _ in range(rows)]
    spans = [
        sum(max(o.costs[row] for o in group) for group in groups)
        + sum(max(t[row + 1] for t in pair.entries.values()) for pair in pairs)
        for row in range(rows)
    ]
    limits = tuple(int(share * span) for share, span in zip(shares, spans, strict=True))
    return PairedInstance(Instance(groups, limits, constant=draw(st.integers(-9, 9))), pairs)


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=100, deadline=None)
@given(paired=programs())
def test_the_optimum_is_that_of_enumeration(solver: str, paired: PairedInstance) -> None:
    fitting = [paired.totals(keys)[0] for keys in every_choice(paired) if paired.is_met_by(keys)]
    found = find_either(paired, solver=solver, time_limit=30, max_gap=0.0)
    if found is None:
        assert not fitting
        return
    assert paired.is_met_by(found.keys)
    assert found.objective == found.bound == paired.totals(found.keys)[0]
    assert found.objective == pytest.approx(min(fitting), rel=1e-9, abs=1e-9)


def chain(seed: int, groups: int = 12) -> PairedInstance:
    """A chain of groups in which changing class costs, and a limit that calls for changes."""
    generator = np.random.default_rng(seed)
    keys = itertools.count()
    made = tuple(
        tuple(
            Option(next(keys), int(value), (int(cost),))
            for value, cost in zip(
                [*(10 ** generator.uniform(2, 6, 3)), 0],
                [*generator.integers(5, 20, 3), 60],
                strict=True,
            )
        )
        for _ in range(groups)
    )
    pairs = tuple(
        Pair(
            place,
            place + 1,
            {
                (a.key, b.key): (0, 9 if (a.value == 0) != (b.value == 0) else 0)
                for a, b in itertools.product(made[place], made[place + 1])
            },
        )
        for place in range(groups - 1)
    )
    return PairedInstance(Instance(made, (groups * 30,)), pairs)


def test_a_start_from_another_limit_changes_nothing() -> None:
    paired = chain(0)
    first = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)
    assert first is not None
    instance = paired.instance
    tighter = PairedInstance(Instance(instance.groups, (290,)), paired.pairs)
    cold = find_paired_optimum(tighter, solver="cbc", time_limit=30, max_gap=0.0)
    start = Start(first.keys, floor=first.objective)
    warm = find_paired_optimum(tighter, solver="cbc", time_limit=30, max_gap=0.0, start=start)
    assert cold is not None
    assert warm is not None
    assert cold.objective == warm.objective == warm.bound > first.objective
    # A floor that is the optimum is a proof.
    proven = Start(cold.keys, floor=cold.objective)
    again = find_paired_optimum(tighter, solver="cbc", time_limit=30, max_gap=0.0, start=proven)
    assert again is not None
    assert again.keys == cold.keys


def test_where_pairs_cost_nothing_it_is_the_plain_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    paired = chain(1)
    free = PairedInstance(Instance(paired.instance.groups, (10**6,)), paired.pairs)
    plain = find_optimum(free.instance, solver="cbc", time_limit=30, max_gap=0.0)

    def never(*args: Any, **options: Any) -> Branched:
        raise AssertionError("no integer program with pairs is needed")

    monkeypatch.setattr(module, "branch_pairs", never)
    found = find_paired_optimum(free, solver="cbc", time_limit=30, max_gap=0.0)
    assert found == plain
    alone = PairedInstance(free.instance, ())
    assert find_either(alone, solver="cbc", time_limit=30, max_gap=0.0) == plain


def test_a_gap_that_is_allowed_is_kept_and_said() -> None:
    paired = chain(2)
    best = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)
    found = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.5)
    assert best is not None
    assert found is not None
    assert found.bound <= best.objective <= found.objective
    assert found.objective - found.bound <= Fraction(1, 2) * found.objective


def test_solutions_that_exceed_a_limit_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that first answers with every choice that exceeds the limit, best first."""
    paired = chain(3, groups=3)
    true = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)
    options = {option.key: option for option in paired.instance.options}
    wrong = sorted(
        (keys for keys in every_choice(paired) if not paired.is_met_by(keys)),
        key=lambda keys: paired.totals(keys)[0],
    )
    genuine, seen = module.branch_pairs, []

    def careless(reduced: PairedInstance, covers: Any, **given: Any) -> Branched:
        settled = set(reduced.instance.settled)
        kept = {option.key for option in reduced.instance.options} | settled
        for keys in wrong:
            is_cut = any(len(cover.keys & keys) > cover.most for cover in covers)
            if keys <= kept and settled <= keys and not is_cut:
                seen.append(keys)
                chosen = tuple(options[key] for key in sorted(keys - settled))
                return Branched(chosen, complete=True, bound=0.0)
        return genuine(reduced, covers, **given)

    monkeypatch.setattr(module, "branch_pairs", careless)
    found = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)
    assert found is not None
    assert true is not None
    assert found.objective == true.objective
    # Each was cut off when it came, most of them by the cover of another.
    assert 0 < len(seen) == len(set(seen)) < len(wrong)


def test_time_that_runs_out_leaves_the_best_choice_or_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paired = chain(4, groups=25)
    genuine = module.branch_pairs
    calls = []

    def late(reduced: PairedInstance, covers: Any, **given: Any) -> Branched:
        calls.append(given["seconds"])
        if len(calls) > 1:
            given["seconds"] = 0.0
        return genuine(reduced, covers, **given)

    monkeypatch.setattr(module, "branch_pairs", late)
    found = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)
    assert found is not None
    assert paired.is_met_by(found.keys)
    assert found.bound < found.objective
    with pytest.raises(BudgetError, match="found no choice within all limits in 30 s, and did not"):
        find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)


def test_the_plain_program_leaves_time_for_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take half, whether it then has no choice, or one that it did not prove."""
    paired = chain(5)
    best = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)
    assert best is not None
    free = PairedInstance(Instance(paired.instance.groups, (10**6,)), paired.pairs)
    cheapest = find_paired_optimum(free, solver="cbc", time_limit=30, max_gap=0.0)
    assert cheapest is not None

    def out_of_time(instance: Instance, **options: Any) -> Found:
        assert options["time_limit"] == 15
        raise BudgetError("found no choice within all limits in 15 s")

    monkeypatch.setattr(module, "find_optimum", out_of_time)
    found = find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0)
    assert found is not None
    assert found.objective == found.bound == best.objective

    def unproven(instance: Instance, **options: Any) -> Found:
        dearest = max(instance.groups[0], key=lambda option: option.value)
        keys = frozenset({dearest.key, *(key for key in cheapest.keys if key >= 4)})
        return Found(keys, free.totals(keys)[0], Fraction(-1))

    assert free.totals(unproven(free.instance).keys)[0] > cheapest.objective
    monkeypatch.setattr(module, "find_optimum", unproven)
    found = find_paired_optimum(free, solver="cbc", time_limit=30, max_gap=0.0)
    assert found is not None
    assert found.objective == found.bound == cheapest.objective


def test_ends_that_no_limit_lets_meet_leave_no_choice() -> None:
    """Each limit alone leaves one option a group, and the pair of these two exceeds another."""
    groups = (
        (Option(0, 0, (0, 9)), Option(1, 0, (0, 0))),
        (Option(2, 0, (0, 0)), Option(3, 0, (0, 9))),
    )
    entries = {(0, 2): (0, 0, 0), (0, 3): (0, 7, 0), (1, 2): (0, 7, 0), (1, 3): (0, 0, 0)}
    paired = PairedInstance(Instance(groups, (5, 5)), (Pair(0, 1, entries),))
    assert find_optimum(paired.instance, solver="cbc", time_limit=30, max_gap=0.0) is not None
    assert find_paired_optimum(paired, solver="cbc", time_limit=30, max_gap=0.0) is None


def test_terms_of_a_few_in_ten_million_lead_to_no_wrong_optimum() -> None:
    million = 10**6
    groups = (
        (
            Option(1, 0, (0, 15 * million)),
            Option(2, 1, (19_999_997, 15_000_004)),
            Option(0, 5 * million, (24_999_996, 0)),
        ),
        (Option(3, 0, (0, 20_000_002)), Option(4, 20 * million, (2, 0))),
        (Option(5, 0, (0, 0)), Option(6, 20_000_001, (9_999_999, 10_000_001))),
        (
            Option(7, 0, (5_000_002, 9_999_995)),
            Option(8, 2, (0, 4_999_999)),
            Option(9, 10 * million, (5_000_001, 0)),
        ),
        (Option(10, 0, (15 * million, 0)), Option(12, 5_000_001, (0, 10_000_001))),
    )
    takes = {
        (1, 4): {(4, 10): (0, 10_000_002, 2)},
        (0, 1): {(0, 3): (0, 5_000_003, 0), (2, 3): (0, 3, 0)},
        (0, 4): {(2, 10): (0, 2, 0), (0, 12): (0, 5 * million, 0), (1, 12): (0, 10_000_001, 0)},
        (0, 2): {(0, 6): (0, 0, 5 * million), (2, 6): (0, 0, 4_999_997)},
        (1, 2): {(3, 5): (0, 0, 2), (4, 6): (0, 0, 9_999_998)},
        (1, 3): {(3, 8): (0, 0, 4_999_995), (4, 7): (0, 0, 10_000_007)},
    }
    pairs = tuple(
        Pair(
            left,
            right,
            {
                (a.key, b.key): found.get((a.key, b.key), (0, 0, 0))
                for a in groups[left]
                for b in groups[right]
            },
        )
        for (left, right), found in takes.items()
    )
    paired = PairedInstance(Instance(groups, (62_117_756, 29_999_997)), pairs)
    best = find_paired_optimum(paired, solver="cbc", time_limit=60.0, max_gap=0.0)
    assert best is not None
    # CBC alone ends at 20,000,002.
    assert (best.objective, best.keys) == (15 * million, frozenset({0, 3, 5, 9, 10}))
