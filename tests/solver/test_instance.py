from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from fxmpq.solver.instance import Instance, Option, reduce_instance


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    rows = draw(st.integers(0, 3))
    keys = itertools.count()
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        options = draw(st.integers(1, 4))
        groups.append(
            tuple(
                Option(
                    next(keys),
                    draw(st.integers(-5, 5)),
                    tuple(draw(st.integers(-3, 6)) for _ in range(rows)),
                )
                for _ in range(options)
            )
        )
    return Instance(tuple(groups), tuple(draw(st.integers(-4, 16)) for _ in range(rows)))


def solutions(instance: Instance) -> dict[frozenset[int], int]:
    """The objective of every choice that keeps the limits."""
    return {
        frozenset(instance.settled).union(option.key for option in chosen): instance.constant
        + sum(option.value for option in chosen)
        for chosen in itertools.product(*instance.groups)
        if instance.is_met_by(chosen)
    }


@given(instance=instances())
def test_reduction_keeps_the_optimum_and_every_objective(instance: Instance) -> None:
    before = solutions(instance)
    reduced = reduce_instance(instance)
    if reduced is None:
        assert not before
        return
    after = solutions(reduced)
    assert after.items() <= before.items()
    assert min(after.values(), default=None) == min(before.values(), default=None)


@given(instance=instances(), ceiling=st.integers(-10, 10))
def test_a_ceiling_keeps_an_optimum_that_lies_below_it(instance: Instance, ceiling: int) -> None:
    best = min(solutions(instance).values(), default=math.inf)
    reduced = reduce_instance(instance, ceiling)
    found = math.inf if reduced is None else min(solutions(reduced).values(), default=math.inf)
    assert found == best if best <= ceiling else found >= best


@given(instance=instances())
def test_what_remains_is_normalised(instance: Instance) -> None:
    reduced = reduce_instance(instance)
    for group in () if reduced is None else reduced.groups:
        assert len(group) > 1
        assert min(option.value for option in group) == 0
        for row, limit in enumerate(reduced.limits if reduced else ()):
            costs = [option.costs[row] for option in group]
            assert min(costs) == 0
            assert max(costs) <= limit


def test_limits_are_rounded_down_to_what_sums_can_reach() -> None:
    group = (Option(0, 1, (0,)), Option(1, 0, (6,)))
    other = (Option(2, 1, (0,)), Option(3, 0, (9,)))
    reduced = reduce_instance(Instance((group, other), (14,)))
    assert reduced is not None
    assert reduced.limits == (4,)
    assert [option.costs for option in reduced.options] == [(2,), (0,), (3,), (0,)]


@given(instance=instances(), ceiling=st.integers(-10, 20))
def test_rows_name_the_limits_before_and_what_divided_them(
    instance: Instance, ceiling: int
) -> None:
    """Also of an instance that was reduced before."""
    reduced = reduce_instance(instance)
    again = None if reduced is None else reduce_instance(reduced, ceiling)
    before = {option.key: option for option in instance.options}
    for found in (reduced, again):
        if found is None:
            continue
        assert len(found.rows) == len(found.limits)
        for place, (row, divisor) in enumerate(found.rows):
            for group in found.groups:
                shifts = {
                    before[option.key].costs[row] - option.costs[place] * divisor
                    for option in group
                }
                assert len(shifts) == 1


@given(instance=instances(), data=st.data())
def test_only_the_options_kept_remain(instance: Instance, data: st.DataObject) -> None:
    kept = [data.draw(st.booleans()) for _ in instance.options]
    found = instance.keeping(kept)
    assert found.options == [o for o, stays in zip(instance.options, kept, strict=True) if stays]
    assert len(found.groups) == len(instance.groups)
    assert (found.limits, found.constant) == (instance.limits, instance.constant)
