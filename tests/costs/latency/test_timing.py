"""Timing runs in turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fxmpq.costs.latency.timing import clock_for, cpu_seconds


def test_the_least_time_of_the_rounds_counts() -> None:
    now = 0.0
    order: list[str] = []

    def run(name: str, times: list[float]) -> Callable[[], None]:
        waiting = iter(times)

        def spend() -> None:
            nonlocal now
            order.append(name)
            now += next(waiting)

        return spend

    # The first three warm up, however quick they are.
    first = run("a", [0.5, 0.5, 0.5, 4.0, 3.0])
    second = run("b", [0.5, 0.5, 0.5, 7.0, 9.0])
    assert cpu_seconds([first, second], rounds=2, clock=lambda: now) == [3.0, 7.0]
    assert order == ["a", "b"] * 5


def test_nothing_is_recorded_for_gradients() -> None:
    seen: list[bool] = []
    cpu_seconds([lambda: seen.append(torch.is_grad_enabled())], rounds=1)
    assert set(seen) == {False}


def test_several_threads_are_not_summed_up() -> None:
    assert (clock_for(1), clock_for(2)) == (time.process_time, time.perf_counter)


def test_no_runs_take_no_time() -> None:
    assert cpu_seconds([], rounds=2) == []
