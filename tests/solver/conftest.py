from __future__ import annotations

import itertools

from hypothesis import strategies as st

from fxmpq.costs.table import CostTable
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.instance import Instance, Option
from fxmpq.solver.pairs import Pair, PairedInstance
from fxmpq.solver.program import Row


@st.composite
def paired_programs(draw: st.DrawFn, *, least_rows: int = 0) -> PairedInstance:
    """Small programs with pairs: one to four groups, at most two limits and three pairs."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rows = draw(st.integers(least_rows, 2))
    number = st.integers(0, 5)
    groups = draw_groups(draw, sizes, rows, value=st.integers(-3, 5), cost=number)
    pairs = draw_pairs(draw, groups, st.tuples(*[number for _ in range(rows + 1)]), most=3)
    limits = tuple(draw(st.integers(0, 25)) for _ in range(rows))
    instance = Instance(groups, limits, constant=draw(st.integers(-2, 2)))
    return PairedInstance(instance, pairs)


def draw_groups(
    draw: st.DrawFn,
    sizes: list[int],
    rows: int,
    *,
    value: st.SearchStrategy[int],
    cost: st.SearchStrategy[int],
) -> tuple[tuple[Option, ...], ...]:
    """Groups of options, numbered through."""
    keys = itertools.count()
    return tuple(
        tuple(
            Option(next(keys), draw(value), tuple(draw(cost) for _ in range(rows)))
            for _ in range(size)
        )
        for size in sizes
    )


def draw_pairs(
    draw: st.DrawFn,
    groups: tuple[tuple[Option, ...], ...],
    entry: st.SearchStrategy[tuple[int, ...]],
    *,
    most: int,
) -> tuple[Pair, ...]:
    """What some pairs of groups take, each combination of options on its own."""
    every_ends = list(itertools.combinations(range(len(groups)), 2))
    if not every_ends:
        return ()
    return tuple(
        Pair(
            left,
            right,
            {(a.key, b.key): draw(entry) for a in groups[left] for b in groups[right]},
        )
        for left, right in draw(st.lists(st.sampled_from(every_ends), max_size=most, unique=True))
    )


def every_choice(paired: PairedInstance) -> list[frozenset[int]]:
    """The keys of each choice of one option a group."""
    keys = ([option.key for option in group] for group in paired.instance.groups)
    return [frozenset(found) for found in itertools.product(*keys)]


Losses = dict[str, dict[str, float]]


def opposed_limits() -> tuple[Losses, list[Row]]:
    """Groups that lose nothing, and limits that pull each pair of them apart.

    Two of 81 choices are within them; no one step from a rounded choice removes what is too much.
    """
    names = ("w2a8", "w4a8", "w8a8")
    costs = [
        ([[9, 1, 7], [4, 0, 0], [2, 9, 7], [5, 5, 0]], 11),
        ([[4, 7, 3], [6, 8, 8], [1, 3, 9], [8, 4, 9]], 22),
        ([[1, 6, 5], [1, 5, 6], [4, 7, 1], [3, 4, 1]], 12),
    ]
    rows = [
        Row({f"g{g}": dict(zip(names, row, strict=True)) for g, row in enumerate(table)}, limit)
        for table, limit in costs
    ]
    return {group: dict.fromkeys(names, 0.0) for group in rows[0].table}, rows


Tables = tuple[Sensitivity, CostTable]


def sizes(groups: int) -> Tables:
    """Losses that fall fourfold a bit, and sizes in bits."""
    bits = {"w2a8": 2, "w4a8": 4, "w8a8": 8}
    weights = {f"g{g}": {n: (g + 3) * b for n, b in bits.items()} for g in range(groups)}
    values = {f"g{g}": {n: (1 + g % 3) * 4.0**-b for n, b in bits.items()} for g in range(groups)}
    total = 32 * sum(g + 3 for g in range(groups))
    work = {group: {n: row[n] ** 2 for n in bits} for group, row in weights.items()}
    return Sensitivity(values), CostTable({"weights": weights, "bops": work}, {"weights": total})
