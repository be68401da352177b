"""Loading pieces of a model, and the whole of it, in the runtime at given precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmpq.costs.latency.cut import Piece
from fxmpq.costs.latency.runtime import Runtime
from fxmpq.costs.measurable import calibrated_on_example, with_float
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.batches import Batch, example_batch, first_sample
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.products import PRODUCT, find_products
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace

Choice = tuple[str, ...]
"""A precision for each group, in graph order."""


@dataclass(frozen=True)
class Loaded:
    """What runs in the runtime, with its input.

    Args:
        run: Takes the batch.
        batch: What it runs on.
    """

    run: Callable[[Batch], object]
    batch: Batch

    def __call__(self) -> object:
        """Run once."""
        return self.run(self.batch)


def load_piece(
    piece: Piece, choices: Sequence[Choice], rules: TargetRules, runtime: Runtime
) -> list[Loaded]:
    """Load a piece once for each choice.

    Args:
        piece: From `cut`.
        choices: Each names a precision for every layer of the piece, in order.
        rules: The target's.
        runtime: The target's.

    Raises:
        FxmpqError: If the piece has other groups than the choices name.
    """
    wanted = dict.fromkeys(Precision.parse(name) for choice in choices for name in choice)
    traced = trace(piece.module, piece.inputs)
    products = PRODUCT in rules.operators and bool(find_products(traced))
    if products and all(entry.activation is None for entry in wanted):
        # A product has a group only where some candidate quantizes it.
        wanted |= dict.fromkeys(rules.default_candidates)
    prepared = insert_quantizers(traced, rules, candidates=tuple(wanted), products=products)
    batch = piece.inputs if state_of(prepared).dynamic else None
    return load_graph(calibrated_on_example(prepared), choices, runtime, batch)


def load_graph(
    calibrated: fx.GraphModule,
    choices: Iterable[Choice],
    runtime: Runtime,
    batch: Batch | None = None,
) -> list[Loaded]:
    """Load a calibrated graph once for each choice, float among them.

    Args:
        calibrated: From `calibrate`; not changed.
        choices: Each names a precision for every group, in order.
        runtime: The target's.
        batch: What it is to run on; one sample, or the example where the batch size is fixed, if
            `None`.

    Raises:
        FxmpqError: If there are other groups.
    """
    graph = with_float(calibrated)
    groups = state_of(graph).groups
    ran = first_sample(graph, example_batch(graph)) if batch is None else batch
    found = []
    for choice in choices:
        if len(choice) != len(groups):
            raise FxmpqError(
                f"{len(choice)} precisions are named for {len(groups)} groups: "
                f"{', '.join(group.name for group in groups)}"
            )
        named: Mapping[str, str] = dict(zip((g.name for g in groups), choice, strict=True))
        model = Loaded(runtime.load(with_choices(graph, named)), ran)
        # What compiles for a batch when it meets it does so now.
        model()
        found.append(model)
    return found
