"""Timing many runs side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 30
_WARM_UP = 3


def clock_for(threads: int) -> Callable[[], float]:
    """What tells how long a run takes, in seconds.

    One thread's CPU time leaves out what other processes take. That of several threads would be
    their sum, waiting included, so there the time that passes counts.

    Args:
        threads: That a run computes in.
    """
    return time.process_time if threads == 1 else time.perf_counter


def cpu_seconds(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> list[float]:
    """Time of each run, all of them taking turns; by default CPU time.

    In a round everything runs once, so that a slow minute of the machine is nobody's
    disadvantage, and each finds its weights as cold as they are in a model of many layers. The
    result is the least time of all rounds, which drops what other processes did to the caches;
    the first three warm up and are not counted.

    Args:
        runs: Called without arguments.
        rounds: Rounds that count.
        clock: Tells the time, in seconds.

    Returns:
        Seconds, in the order of the runs.

    Examples:
        >>> ticks = iter(range(100))
        >>> cpu_seconds([lambda: None], rounds=3, clock=lambda: float(next(ticks)))
        [1.0]
    """
    times: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for turn in range(_WARM_UP + rounds):
            for run, found in zip(runs, times, strict=True):
                start = clock()
                run()
                spent = clock() - start
                if turn >= _WARM_UP:
                    found.append(spent)
    return [min(found) for found in times]
