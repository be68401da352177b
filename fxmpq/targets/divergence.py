"""Where a converted model leaves its simulation: each layer compared on the inputs it really got.

Quantization amplifies differences: a sum that float addition rounds otherwise may fall on the
other side of a step, the next layer sees that step, and after twenty layers a conversion without
any mistake may agree to 30 dB only. So layers are not compared on what the simulation computed
before them, but on what the target did: the simulation runs node by node, and goes on from the
target's own value wherever the target tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmpq.errors import TargetError
from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.run import float_outputs, run_batch
from fxmpq.targets.target import Converted, LayerValue, agreement_db

REQUIRED_AGREEMENT_DB = 35.0
"""Output SQNR against the simulation below which a conversion is looked at layer by layer, and
SQNR of a layer's own output below which it is refused."""

_SCATTER_DB = 10.0
"""By how much runs that differ by rounding alone may differ in their agreement, where all of them
are far from the simulation."""


@dataclass(frozen=True)
class LayerAgreement:
    """How far a layer's output is from the simulation's, given the same inputs.

    Args:
        layer: Its name; empty for the model's outputs, given the last layers' outputs.
        sqnr_db: `10 log10(sum y^2 / sum (y - z)^2)` in dB, of this layer and what lies between
            it and the layers before it; `inf` if equal.
    """

    layer: str
    sqnr_db: float


class _TargetFed(fx.Interpreter):
    """Runs a simulation that goes on from the target's values, and compares each with its own."""

    def __init__(self, graph: fx.GraphModule, values: Sequence[LayerValue]) -> None:
        super().__init__(graph)
        self._values = {entry.node: entry for entry in values if entry.layer}
        self.found: list[LayerAgreement] = []

    def run_node(self, n: fx.Node) -> object:
        """Run a node; return the target's value where there is one."""
        result = super().run_node(n)
        entry = self._values.get(n.name)
        if entry is None or not isinstance(result, Tensor):
            return result
        if entry.value.shape != result.shape:
            # Of a layer on constants, say, which a runtime computes on loading with what reads it.
            return result
        value = entry.value.to(result)
        self.found.append(LayerAgreement(entry.layer, agreement_db([result], [value])))
        return value


def layer_agreements(
    graph: fx.GraphModule, converted: Converted, batch: Batch
) -> tuple[LayerAgreement, ...]:
    """Compare the layers of a converted model with the simulation, each on the inputs it got.

    Costs one pass of the simulation and one of the target.

    Args:
        graph: The planned graph it was converted from.
        converted: With `layer_values`.
        batch: What the model takes.

    Returns:
        An entry a layer that the target tells about, in the order they run, then one for the
        model's outputs; empty if it tells about none.
    """
    return _agreements(graph, converted, batch, _told(converted, batch))


def _told(converted: Converted, batch: Batch) -> Sequence[LayerValue]:
    """What a target tells about a batch: nothing if it does not tell about layers."""
    return () if converted.layer_values is None else converted.layer_values(batch)


def _agreements(
    graph: fx.GraphModule, converted: Converted, batch: Batch, values: Sequence[LayerValue]
) -> tuple[LayerAgreement, ...]:
    """See `layer_agreements`; the values are what the target told about the batch."""
    if not values:
        return ()
    fed = _TargetFed(graph, values)
    with torch.no_grad():
        outputs = fed.run(*flat_inputs(graph, batch), enable_io_processing=False)
    returned = _shown_outputs(values) or converted.run(batch)
    actual = [leaf for leaf in returned if leaf.is_floating_point()]
    last = agreement_db([leaf.cpu() for leaf in float_outputs(outputs)], actual)
    return (*fed.found, LayerAgreement("", last))


def check_layers(
    graph: fx.GraphModule, converted: Converted, batch: Batch, found_db: float
) -> None:
    """Refuse a conversion whose outputs differ, unless every layer agrees on the inputs it got.

    Args:
        graph: The planned graph it was converted from.
        converted: The converted model.
        batch: The batch on which outputs differ.
        found_db: By how much, below `REQUIRED_AGREEMENT_DB`.

    Raises:
        TargetError: Naming the layer that diverges first, its SQNR and that of the layer before
            it, and what to try; without a layer if the target does not tell about layers.
    """
    values = _told(converted, batch)
    agreements = _agreements(graph, converted, batch, values)
    diverged = [
        position
        for position, entry in enumerate(agreements)
        if not entry.sqnr_db >= REQUIRED_AGREEMENT_DB
    ]
    if agreements and not diverged:
        _check_what_runs(graph, batch, _shown_outputs(values), found_db)
        return
    text = (
        f"the converted model disagrees with the simulation: {found_db:.1f} dB SQNR on the "
        f"checked batches, where at least {REQUIRED_AGREEMENT_DB:.0f} dB are expected"
    )
    if diverged:
        text += ". " + _first(agreements, diverged[0])
    raise TargetError(f"{text}. verify=False converts without this check")


def _check_what_runs(
    graph: fx.GraphModule, batch: Batch, shown: Sequence[Tensor], found_db: float
) -> None:
    """Refuse a model that agrees where it shows its layers, and not where it runs without that.

    Showing layers may keep a runtime from fusing them. Rounding that is amplified takes both runs
    equally far from the simulation; a wrong fused kernel only the one that has it.
    """
    if not shown:
        return
    expected = [leaf for leaf in run_batch(graph, batch) if isinstance(leaf, Tensor)]
    shown_db = agreement_db(expected, shown)
    if shown_db > found_db + _SCATTER_DB:
        raise TargetError(
            f"the converted model agrees with the simulation to {shown_db:.1f} dB SQNR while it "
            f"shows what its layers compute, and to {found_db:.1f} dB without: what its runtime "
            "fuses computes something else. verify=False converts without this check"
        )


def _shown_outputs(values: Sequence[LayerValue]) -> list[Tensor]:
    """The model's outputs in the run that showed layers, where the target tells them."""
    return [entry.value.cpu() for entry in values if not entry.layer]


def _first(agreements: Sequence[LayerAgreement], position: int) -> str:
    """A sentence on the layer that diverges first, and what to try."""
    entry = agreements[position]
    before = agreements[position - 1] if position else None
    known = "no layer comes before it"
    if before is not None:
        known = f"{before.sqnr_db:.1f} dB at {before.layer!r} just before it"
    if not entry.layer:
        return (
            f"All layers agree; what follows the last of them, {before and before.layer!r}, gives "
            f"{entry.sqnr_db:.1f} dB on the same inputs"
        )
    return (
        f"Layer {entry.layer!r} diverges first: {entry.sqnr_db:.1f} dB on the same inputs "
        f"({known}). Keep it in float, prepare(..., exclude=[{entry.layer!r}]), to go on without it"
    )
