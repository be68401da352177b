"""Loading pieces of a model, and the whole of it, in the runtime at given precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmpq.calibration.calibrate import calibrate
from fxmpq.costs.latency.cut import Piece
from fxmpq.costs.latency.runtime import Runtime
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.batches import Batch, batch_size
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.products import PRODUCT, find_products
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.state import copy_graph, state_of, with_state
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


def calibrated_on_example(
    graph: fx.GraphModule, *, bias_correction: bool = False
) -> fx.GraphModule:
    """Find ranges on the example alone: they do not change how fast a model runs, nor its size.

    Args:
        graph: From `prepare`; not changed.
        bias_correction: Whether quantized layers get biases, which those without one may lack.
    """
    return calibrate(
        graph,
        [_example(graph)],
        ranges="minmax",
        weight_scales="minmax",
        bias_correction=bias_correction,
        progress=False,
    )


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
    ran = one_sample(graph) if batch is None else batch
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


def with_float(calibrated: fx.GraphModule) -> fx.GraphModule:
    """Copy a calibrated graph with float among the candidates of every group.

    Args:
        calibrated: From `calibrate`; not changed.
    """
    state = state_of(calibrated)
    groups = tuple(
        replace(group, candidates=tuple(dict.fromkeys([*group.candidates, Precision()])))
        for group in state.groups
    )
    return with_state(copy_graph(calibrated), replace(state, groups=groups))


def one_sample(graph: fx.GraphModule) -> Batch:
    """The first sample of a graph's example, or all of it if the graph's batch size is fixed."""
    state = state_of(graph)
    leaves = list(state.example)
    samples = batch_size(leaves)
    if state.dynamic:
        leaves = [
            leaf[:1]
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == samples
            else leaf
            for leaf in leaves
        ]
    return _call(graph, leaves)


def _example(graph: fx.GraphModule) -> Batch:
    return _call(graph, list(state_of(graph).example))


def _call(graph: fx.GraphModule, leaves: list[object]) -> Batch:
    call: tuple[tuple[object, ...], dict[str, object]]
    call = pytree.tree_unflatten(leaves, state_of(graph).call_spec)
    args, kwargs = call
    return kwargs or args
