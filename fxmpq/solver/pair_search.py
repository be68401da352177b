"""The search for the optimum of a program with pairs, and its proof."""

from __future__ import annotations

import time
from collections.abc import Collection
from fractions import Fraction

from fxmpq.errors import BudgetError
from fxmpq.solver.branch import Branched, Cover
from fxmpq.solver.pair_model import branch_pairs
from fxmpq.solver.pair_reduction import reduce_pairs, split_pairs
from fxmpq.solver.pairs import PairedInstance, pair_cover
from fxmpq.solver.search import Found, Start, find_optimum

# How far the objective may fall before the scale it was solved at is too coarse.
_COARSE = 1000
# The first choice need not be better than this: it only sets the scale.
_FIRST_GAP = 0.1
# Of the time, for the program without pairs, which may not settle the one with them.
_PLAIN_SHARE = 0.5


def find_paired_optimum(
    paired: PairedInstance,
    *,
    solver: str,
    time_limit: float,
    max_gap: float,
    start: Start | None = None,
) -> Found | None:
    """Find the choice of least value that keeps all limits.

    Without what pairs take beyond the least the program is the plain one, which `find_optimum`
    solves in at most half the time: it bounds this one, and where its choice pays nothing for
    pairs, it is this one's optimum. Else the integer program with pairs (`branch_pairs`) gives a
    choice, whose objective sets the scale and rules out options for the next one, which proves
    the optimum.

    Solvers allow sums to exceed limits by a tolerance. Solutions are therefore checked in
    integers, and one that exceeds a limit is cut off by the cover inequality it violates.

    Args:
        paired: The program.
        solver: `cbc` or `highs`.
        time_limit: In seconds.
        max_gap: Relative gap at which to stop.
        start: From the optimum of other limits, to save time.

    Returns:
        The optimum, or the best choice found in time; `None` if no choice keeps all limits.

    Raises:
        BudgetError: If time ran out before any choice was found.
    """
    began = time.monotonic()
    plain = split_pairs(paired)
    search = _PairSearch(plain, solver, began + time_limit, time_limit, max_gap)
    share = _PLAIN_SHARE * time_limit
    try:
        relaxed = find_optimum(plain.instance, solver=solver, time_limit=share, max_gap=max_gap)
    except BudgetError:
        # No choice in time: what pairs take may rule out more, and there is time left.
        pass
    else:
        if relaxed is None:
            return None
        search.bound = relaxed.bound
        search.offer(relaxed.keys)
        if search.objective == relaxed.objective and search.is_done:
            return relaxed
    if start is not None:
        search.offer(start.keys)
        if start.floor is not None:
            search.bound = max(search.bound, Fraction(start.floor))
    while search.step():
        pass
    if search.objective is None:
        return None
    return Found(search.keys, search.objective, min(search.bound, Fraction(search.objective)))


def find_either(
    paired: PairedInstance,
    *,
    solver: str,
    time_limit: float,
    max_gap: float,
    start: Start | None = None,
) -> Found | None:
    """Find the optimum of a program that may have no pairs: then by `find_optimum` alone.

    Args:
        paired: The program.
        solver: `cbc` or `highs`.
        time_limit: In seconds.
        max_gap: Relative gap at which to stop.
        start: From the optimum of other limits, to save time.

    Returns:
        As `find_paired_optimum`.

    Raises:
        BudgetError: If time ran out before any choice was found.
    """
    if paired.pairs:
        return find_paired_optimum(
            paired, solver=solver, time_limit=time_limit, max_gap=max_gap, start=start
        )
    return find_optimum(
        paired.instance, solver=solver, time_limit=time_limit, max_gap=max_gap, start=start
    )


class _PairSearch:
    """The best choice so far, the bound so far, and the inequalities learnt.

    Pairs have been split from options, so that the least options bound the objective.
    """

    def __init__(
        self,
        paired: PairedInstance,
        solver: str,
        deadline: float,
        seconds: float,
        max_gap: float,
    ) -> None:
        self.keys: frozenset[int] = frozenset()
        self.objective: int | None = None
        least = sum(min(option.value for option in group) for group in paired.instance.groups)
        self.bound = Fraction(paired.instance.constant + least)
        self._paired = paired
        self._solver = solver
        self._deadline = deadline
        self._seconds = seconds
        self._max_gap = max_gap
        self._covers: list[Cover] = []

    def offer(self, keys: Collection[int]) -> None:
        """Take a choice that may exceed limits if it does not."""
        if self._paired.is_met_by(keys):
            self.take(keys)

    def take(self, keys: Collection[int]) -> None:
        """Take a choice if it is the best so far."""
        objective = self._paired.totals(keys)[0]
        if self.objective is None or objective < self.objective:
            self.keys, self.objective = frozenset(keys), objective

    def step(self) -> bool:
        """Solve what is left once; returns whether anything is left to do then."""
        before = self.objective
        if self.is_done:
            return False
        reduced = reduce_pairs(self._paired, None if before is None else before - 1)
        if reduced is None or self._is_free(reduced):
            return self._end()
        constant = reduced.instance.constant
        unit = _worst(reduced) if before is None else before - constant
        answer, keys = self._branch(reduced, unit, _FIRST_GAP if before is None else self._max_gap)
        if keys is not None:
            self.take(keys)
        if before is None:
            # Solved roughly: the next step does it at the scale that is known now.
            return self._has_begun(answer)
        if keys is not None and (self._best() - constant) * _COARSE < unit:
            return True
        if answer.complete and (keys is None or self._max_gap == 0):
            return self._end()
        proven = constant + Fraction(answer.bound) * unit
        self.bound = max(self.bound, min(proven, Fraction(self._best())))
        return False

    def _is_free(self, reduced: PairedInstance) -> bool:
        """Whether every group can take what is best for it; if so, it does."""
        if reduced.instance.limits or reduced.pairs:
            return False
        least = (min(group, key=lambda option: option.value) for group in reduced.instance.groups)
        self.take([*reduced.instance.settled, *(option.key for option in least)])
        return True

    def _has_begun(self, answer: Branched) -> bool:
        """Whether there is a first choice."""
        if answer.chosen is None and not answer.complete:
            raise BudgetError(
                f"{self._solver} found no choice within all limits in {self._seconds:g} s, and did "
                "not prove that there is none; give it a longer time_limit, or raise the budget"
            )
        return answer.chosen is not None

    def _branch(
        self, reduced: PairedInstance, unit: int, gap: float
    ) -> tuple[Branched, frozenset[int] | None]:
        """Solve by the integer program until the answer keeps all limits without rounding."""
        while True:
            answer = branch_pairs(
                reduced,
                self._covers,
                solver=self._solver,
                seconds=self._deadline - time.monotonic(),
                unit=unit,
                gap=gap,
            )
            if answer.chosen is None:
                return answer, None
            chosen = (option.key for option in answer.chosen)
            keys = frozenset(reduced.instance.settled).union(chosen)
            if self._paired.is_met_by(keys):
                return answer, keys
            self._covers.append(pair_cover(self._paired, keys))

    def _end(self) -> bool:
        """Nothing is left that could be better."""
        if self.objective is not None:
            self.bound = Fraction(self.objective)
        return False

    def _best(self) -> int:
        assert self.objective is not None, "there is a choice"
        return self.objective

    @property
    def is_done(self) -> bool:
        """Whether there is a choice, and it is proven to be near enough to the best."""
        if self.objective is None:
            return False
        return self.objective - self.bound <= Fraction(self._max_gap) * abs(self.objective)


def _worst(paired: PairedInstance) -> int:
    """What no choice's sum of values exceeds, at least 1."""
    options = sum(max(option.value for option in group) for group in paired.instance.groups)
    pairs = sum(max(terms[0] for terms in pair.entries.values()) for pair in paired.pairs)
    return max(options + pairs, 1)
