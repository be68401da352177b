"""Measuring pieces of a model, and the whole of it, in the runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from fxmpq.costs.latency.cut import Piece, cut
from fxmpq.costs.latency.runtime import Conditions, Runtime
from fxmpq.costs.latency.store import Key, TimeStore
from fxmpq.costs.latency.timing import cpu_seconds
from fxmpq.costs.latency.variants import (
    Choice,
    Loaded,
    load_graph,
    load_piece,
)
from fxmpq.costs.measurable import calibrated_on_example
from fxmpq.formats import Precision
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.progress import track

FLOAT = str(Precision())
_AT_ONCE = 48
"""Models that are loaded at once: as many as outgrow a CPU's caches together."""


@dataclass
class Wanted:
    """Pieces to measure, those that compute the same on equal shapes once.

    Args:
        pieces: By signature.
        choices: By signature, in order, each once.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    choices: dict[str, dict[Choice, None]] = field(default_factory=dict)

    def add(self, piece: Piece, choices: Iterable[Choice]) -> str:
        """Ask for a piece at some precisions; returns its signature."""
        self.pieces.setdefault(piece.signature, piece)
        self.choices.setdefault(piece.signature, {}).update(dict.fromkeys(choices))
        return piece.signature


PieceTimes = Mapping[tuple[str, Choice], float]
"""Seconds by a piece's signature and its layers' precisions."""


@dataclass(frozen=True)
class Measurer:
    """Measures in one runtime, and remembers on disk.

    Args:
        rules: The target's.
        runtime: The target's.
        store: Of times.
        clock: Tells the time, in seconds.
        progress: Whether to show a progress bar.
    """

    rules: TargetRules
    runtime: Runtime
    store: TimeStore
    clock: Callable[[], float]
    progress: bool = False

    def pieces(self, wanted: Wanted) -> PieceTimes:
        """Measure pieces; those that were measured before are looked up.

        What is measured is kept after every few pieces, so that an interruption loses little.
        """
        times: dict[tuple[str, Choice], float] = {}
        missing: dict[str, list[Choice]] = {}
        for signature, choices in wanted.choices.items():
            for choice in choices:
                known = self.store.find(self._key(signature, choice))
                if known is None:
                    missing.setdefault(signature, []).append(choice)
                else:
                    times[signature, choice] = known
        total = sum(map(len, missing.values()))
        loaded: dict[tuple[str, Choice], Loaded] = {}
        for entry, model in track(
            self._loaded(wanted, missing), "measuring layers", total=total, shown=self.progress
        ):
            loaded[entry] = model
            if len(loaded) >= _AT_ONCE:
                times.update(self._timed(loaded))
                loaded = {}
        times.update(self._timed(loaded))
        return times

    def whole(self, graph: fx.GraphModule, choices: Sequence[Choice]) -> Mapping[Choice, float]:
        """Measure a whole model.

        Args:
            graph: From `prepare` or later; not changed.
            choices: Each a precision for every group, in order.

        Returns:
            Seconds by choice.
        """
        state = require(graph, stage="prepared")
        shapes = [list(leaf.shape) for leaf in state.example if isinstance(leaf, Tensor)]
        groups = [[member.name for member in group.members] for group in state.groups]
        signature = f"{state.fingerprint} on {shapes} in {groups}"
        times: dict[tuple[str, Choice], float] = {}
        for choice in choices:
            known = self.store.find(self._key(signature, choice))
            if known is not None:
                times[signature, choice] = known
        missing = [choice for choice in choices if (signature, choice) not in times]
        if missing:
            calibrated = graph if state.calibrated else calibrated_on_example(graph)
            steps = track(missing, "measuring whole models", shown=self.progress)
            models = {
                (signature, choice): load_graph(calibrated, [choice], self.runtime)[0]
                for choice in steps
            }
            times |= self._timed(models)
        return {choice: times[signature, choice] for choice in choices}

    def call(self) -> float:
        """What a call takes whatever it computes: the time of a tiny layer in float, in seconds."""
        graph = trace(nn.Linear(1, 1), torch.ones(2, 1))
        (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
        wanted = Wanted()
        signature = wanted.add(cut(graph, {node.name}, node.name), [(FLOAT,)])
        return self.pieces(wanted)[signature, (FLOAT,)]

    def _loaded(
        self, wanted: Wanted, missing: Mapping[str, Sequence[Choice]]
    ) -> Iterator[tuple[tuple[str, Choice], Loaded]]:
        for signature, choices in missing.items():
            models = load_piece(wanted.pieces[signature], choices, self.rules, self.runtime)
            for choice, model in zip(choices, models, strict=True):
                yield (signature, choice), model

    def _timed(self, loaded: Mapping[tuple[str, Choice], Loaded]) -> PieceTimes:
        found = cpu_seconds(list(loaded.values()), clock=self.clock)
        for (signature, choice), seconds in zip(loaded, found, strict=True):
            self.store.keep(self._key(signature, choice), seconds)
        return dict(zip(loaded, found, strict=True))

    @cached_property
    def _conditions(self) -> Conditions:
        return self.runtime.conditions()

    def _key(self, signature: str, choice: Choice) -> Key:
        return {**self._conditions, "model": signature, "precisions": list(choice)}
