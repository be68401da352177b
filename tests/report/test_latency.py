from __future__ import annotations

import contextlib
from collections.abc import Callable
from time import sleep

import pytest
import torch

from fxmpq.errors import FxmpqError
from fxmpq.report import latency
from fxmpq.report.latency import latency_ms, use_threads


class Clock:
    """Time that passes only where a model says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def model(self, seconds: list[float], calls: list[str], name: str) -> Callable[..., list]:
        """A model whose n-th run takes the n-th of `seconds`."""
        remaining = iter(seconds)

        def run(batch: object) -> list:
            calls.append(name)
            self.now += next(remaining)
            return []

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(latency, "time", found)
    return found


def test_it_is_the_median_of_the_rounds_least_times_without_the_first_round(clock: Clock) -> None:
    warm_up, rounds = [9.0, 9.0], [[0.004, 0.003], [0.030, 0.020], [0.005, 0.009]]
    times = warm_up + [time for one_round in rounds for time in one_round]
    found = latency_ms({"a": clock.model(times, [], "a")}, torch.ones(1), rounds=3, repeats=2)
    assert found == {"a": pytest.approx(5.0)}


def test_models_take_turns_and_each_round_starts_with_another(clock: Clock) -> None:
    calls: list[str] = []
    runs = {name: clock.model([0.001] * 6, calls, name) for name in "abc"}
    latency_ms(runs, torch.ones(1), rounds=2, repeats=2)
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb"


def test_real_time_is_wall_time_in_milliseconds() -> None:
    found = latency_ms(
        {"slow": lambda batch: [sleep(0.003)], "fast": lambda batch: []},
        torch.ones(1),
        rounds=1,
        repeats=1,
    )
    assert found["slow"] >= 3.0
    assert found["slow"] > found["fast"]


@pytest.mark.parametrize(("rounds", "repeats"), [(0, 1), (1, 0)])
def test_nothing_to_measure_is_refused(rounds: int, repeats: int) -> None:
    with pytest.raises(FxmpqError, match=f"rounds={rounds}, repeats={repeats}"):
        latency_ms({}, torch.ones(1), rounds=rounds, repeats=repeats)


def test_threads_are_restored_after_an_error_and_none_leaves_them() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(KeyError), use_threads(1):
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
        with use_threads(None):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
