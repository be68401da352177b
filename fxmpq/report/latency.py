"""Latency: how long models take for one batch, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch
from fxmpq.report.metrics import Run


def latency_ms(
    runs: Mapping[str, Run], batch: Batch, *, rounds: int = 15, repeats: int = 7
) -> dict[str, float]:
    """Time several models on the same batch, in turns.

    A round runs every model `repeats` times and keeps each one's least wall time, which
    drops what the operating system interrupted; the result is the median over the rounds.
    The models take turns within a round and every round starts with another one, so that a
    slow minute of the machine is no model's disadvantage. One round more, the first, warms
    caches up and is not counted.

    The numbers belong to one thread if the models were converted within `use_threads(1)`
    and are timed within it.

    Args:
        runs: Runnable models by name, as `Converted.run`.
        batch: What they take; its size is the number of samples the time is for.
        rounds: Rounds that count, at least 1.
        repeats: Runs of each model in a round, at least 1.

    Returns:
        Milliseconds per batch, by name.

    Raises:
        FxmpqError: If `rounds` or `repeats` is less than 1.
    """
    if rounds < 1 or repeats < 1:
        raise FxmpqError(
            f"latency needs at least one round and one repeat; found rounds={rounds}, "
            f"repeats={repeats}"
        )
    names = list(runs)
    least: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for turn in range(rounds + 1):
            start = turn % max(len(names), 1)
            for name in names[start:] + names[:start]:
                least[name].append(min(_seconds(runs[name], batch) for _ in range(repeats)))
    return {name: 1000 * statistics.median(times[1:]) for name, times in least.items()}


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Let torch, and the runtimes that follow its setting, use so many threads for a while.

    A runtime that fixes its threads when it loads a model (ONNX Runtime) must load it within
    this context.

    Args:
        count: Threads inside an operator; `None` leaves it as it is.

    Examples:
        >>> with use_threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(run: Run, batch: Batch) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start
