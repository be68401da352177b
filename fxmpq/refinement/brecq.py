"""BRECQ: the roundings and ranges of a whole block, trained together on the block's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from torch import Tensor, fx

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Refinement, require
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.blocks import Block, find_blocks
from fxmpq.refinement.descent import check_rates, check_steps, descend
from fxmpq.refinement.fisher import WEIGHTINGS, fisher_weights
from fxmpq.refinement.units import Units
from fxmpq.refinement.variables import LearnedBias, LearnedRange, SoftWeight, shares_range
from fxmpq.refinement.views import BlockView, QuantizedLayer
from fxmpq.refinement.walk import Walk

NONE = "none"

# Roundings find their places before the penalty begins, and its exponent falls from 20 to 2.
_WARM_UP = 0.2
_FIRST_BETA, _LAST_BETA = 20.0, 2.0


def brecq(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    *,
    units: Units,
    steps: int = 200,
    weighting: str = "outputs",
    rounding_rate: float = 0.02,
    bias_rate: float = 1e-3,
    range_rate: float = 1e-3,
    penalty: float = 0.1,
    seed: int = 0,
) -> list[Refinement]:
    """Train each block's weight roundings, biases and input ranges towards its float output.

    Blocks are cut where one tensor carries everything on, as behind the sum of a residual
    branch. For a block with output `z`, it minimises, by Adam on random batches,

        sum_i f_i (z'_i - z_i)^2,   f_i = (dL/dz_i)^2

    so that errors count as much as the model's output minds them: `L` is a random projection of
    the output, or the cross entropy to labels drawn from the model itself, which is the Fisher
    weighting of the paper (see `fisher_weights`). Each weight is rounded up or down by a soft
    `h(v)` that starts at the present codes, and a penalty whose exponent is annealed drives it
    to 0 or 1; activation ranges are trained straight through (Li et al. 2021,
    arXiv:2102.05426), and so are biases. The block's input comes from the model whose earlier
    blocks are refined already.

    The state with the least error on all batches, hard-rounded, is kept, which may be the one
    before. Left alone are: float formats, embeddings, weights that an earlier block has too, and
    ranges of tensors that are read outside their block.

    Cost: each step runs a block forwards and backwards on one batch, nine checks run it on all
    of them, and the weights take a forward and a backward pass. A ResNet-20 took about 50 float
    passes for 100 steps on 512 images in batches of 64.

    Args:
        graph: With chosen precisions; its quantizers are changed.
        batches: Samples; a step takes one of them, so 32 to 128 samples each are best.
        units: Shows and keeps what is done.
        steps: Of Adam for each block.
        weighting: `outputs`, `labels`, or `none`, with which every `f_i` is 1.
        rounding_rate: Step of Adam for `v`; `h(v)` takes 4.8 from end to end.
        bias_rate: For biases, in root mean squares of the block's output.
        range_rate: For activation ranges, relative to them.
        penalty: Weight of the penalty, relative to the block's error before.
        seed: Of the order of batches, labels and signs.

    Returns:
        The weighted relative squared error of each block's output,
        `sum f (z' - z)^2 / sum f z^2`, before and after, under the name of its first quantized
        layer; `after` is never more.

    Raises:
        FxmpqError: If `steps` is less than 1, a rate or the penalty is no finite number from 0
            on, there is no such weighting, or the model returns nothing to weigh errors by.

    Examples:
        >>> import torch, fxmpq
        >>> batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(4, 2)), batches[0])
        >>> graph = fxmpq.prepare(graph, "reference", candidates=["w3a8", "w8a8"])
        >>> graph = fxmpq.calibrate(graph, batches, progress=False)
        >>> options = {"method": "brecq", "steps": 20, "progress": False}
        >>> refined = fxmpq.refine(graph, {"0": "w3a8"}, batches, **options)
        >>> [found] = fxmpq.graph.state.state_of(refined).refinements
        >>> found.after <= found.before
        True
    """
    check_steps(steps)
    check_rates(rounding_rate=rounding_rate, bias_rate=bias_rate, range_rate=range_rate)
    rates = _Rates(rounding_rate, bias_rate, range_rate)
    if not 0 <= penalty < math.inf:
        raise FxmpqError(f"penalty must be a finite number from 0 on; found {penalty}")
    if weighting not in (*WEIGHTINGS, NONE):
        legal = closest(weighting, [*WEIGHTINGS, NONE])
        raise FxmpqError(f"no weighting {weighting!r}; there are {legal}")
    nodes = _outputs(graph)

    @cache
    def weights() -> Mapping[fx.Node, Sequence[Tensor]]:
        return fisher_weights(graph, batches, nodes, weighting=weighting, seed=seed)

    done = []
    seen: set[str] = set()
    for view in units.track(Walk(graph, batches).blocks(), "brecq"):
        layers = _trainable(view.layers, seen)
        seen.update(layer.layer.weight for layer in view.layers)
        if not layers:
            continue

        def compute(
            view: BlockView = view, layers: Sequence[QuantizedLayer] = layers
        ) -> list[float]:
            found = None if weighting == NONE else weights()[view.block.output]
            return _Training(view, layers, found, penalty).run(rates, steps, seed)

        names = _modules(view.block, layers)
        before, after = units.unit(f"brecq {view.name}", graph, names, compute)
        done.append(Refinement("brecq", view.name, before, after))
    return done


def _outputs(graph: fx.GraphModule) -> list[fx.Node]:
    """What the blocks with a layer compute."""
    groups = require(graph, stage="calibrated").groups
    layers = {layer.node for group in groups for layer in group.layers}
    blocks = find_blocks(graph)
    return [block.output for block in blocks if any(node.name in layers for node in block.nodes)]


def _trainable(layers: Sequence[QuantizedLayer], seen: set[str]) -> list[QuantizedLayer]:
    """Layers with a weight on an even grid that no earlier block has; one layer a weight."""
    found: dict[str, QuantizedLayer] = {}
    for layer in layers:
        number_format = layer.number_format
        is_even = number_format is not None and number_format.is_integer
        if is_even and layer.operator.quantizes_input and layer.layer.weight not in seen:
            found.setdefault(layer.layer.weight, layer)
    return list(found.values())


def _modules(block: Block, layers: Sequence[QuantizedLayer]) -> list[str]:
    """Names of the quantizers that training a block changes."""
    ranges = {str(node.target) for node in block.nodes if node.op == "call_module"}
    return sorted(ranges.union(*(layer.modules for layer in layers)))


class _Rates(NamedTuple):
    rounding: float
    bias: float
    range: float


class _Training:
    """The loss of one block and its variables.

    Args:
        view: The block.
        layers: Whose weights are trained.
        weights: `f` per batch; `None` for ones.
        penalty: Relative to the error before.
    """

    def __init__(
        self,
        view: BlockView,
        layers: Sequence[QuantizedLayer],
        weights: Sequence[Tensor] | None,
        penalty: float,
    ) -> None:
        self._view = view
        self._targets = [view.float_output(batch) for batch in range(len(view))]
        self._weights = weights
        signal = sum(float(self._weigh(z, batch)) for batch, z in enumerate(self._targets))
        if signal <= 0:
            # Nothing tells the values apart, as with a loss that is flat everywhere.
            self._weights = None
            signal = sum(float(self._weigh(z, batch)) for batch, z in enumerate(self._targets))
        self._signal = signal if signal > 0 else 1.0
        size = sum(z.numel() for z in self._targets)
        power = sum(float(z.square().sum()) for z in self._targets) / max(size, 1)
        self._roundings = {
            str(layer.layer.weight_quantizer): SoftWeight(layer.quantizer, layer.weight)
            for layer in layers
            if layer.quantizer is not None
        }
        self._biases = {
            str(layer.layer.bias_correction): LearnedBias(layer, math.sqrt(power) or 1.0)
            for layer in layers
            if layer.correction is not None
        }
        self._ranges = _ranges(view)
        self._before = self._error()
        values = sum(rounding.v.numel() for rounding in self._roundings.values())
        self._penalty = penalty * self._before / max(values, 1)
        self._stand_ins: dict[str, Callable[[Tensor], Tensor]] = {
            **{name: _ignoring(entry.value) for name, entry in self._roundings.items()},
            **{name: _ignoring(entry.value) for name, entry in self._biases.items()},
            **self._ranges,
        }

    def run(self, rates: _Rates, steps: int, seed: int) -> list[float]:
        """Train, and return the weighted relative errors before and after."""
        best = BestSeen(self._view.graph, list(self._stand_ins), self._before)
        variables = [(entry.v, rates.rounding) for entry in self._roundings.values()]
        variables += [(entry.change, rates.bias) for entry in self._biases.values()]
        for entry in self._ranges.values():
            changes = (entry.scale_change, entry.centre_change)
            variables += [(change, rates.range) for change in changes]
        descend(
            variables,
            self._loss,
            best,
            self._harden,
            steps=steps,
            batches=len(self._targets),
            seed=seed,
        )
        return [self._before, best.error]

    def _loss(self, batch: int, progress: float) -> Tensor:
        found = self._view.output(batch, self._stand_ins)
        share = len(self._targets) / self._signal
        loss = self._weigh(found - self._targets[batch], batch) * share
        if progress > _WARM_UP:
            left = (1 - progress) / (1 - _WARM_UP)
            beta = _LAST_BETA + (_FIRST_BETA - _LAST_BETA) * left
            for rounding in self._roundings.values():
                loss = loss + self._penalty * rounding.penalty(beta)
        return loss

    def _harden(self) -> float:
        for rounding in self._roundings.values():
            rounding.write()
        for bias in self._biases.values():
            bias.write()
        for learned in self._ranges.values():
            learned.write()
        return self._error()

    def _error(self) -> float:
        noise = 0.0
        for batch, expected in enumerate(self._targets):
            noise += float(self._weigh(self._view.output(batch) - expected, batch))
        return noise / self._signal

    def _weigh(self, difference: Tensor, batch: int) -> Tensor:
        """`sum f d^2` of a batch."""
        square = difference.square()
        return (square if self._weights is None else square * self._weights[batch]).sum()


def _ranges(view: BlockView) -> dict[str, LearnedRange]:
    """Active activation quantizers of a block that nothing outside it reads.

    One that shares its range with other tensors keeps it.
    """
    inside = set(view.block.nodes)
    found = {}
    for node in view.block.nodes:
        if node.op != "call_module" or not inside.issuperset(node.users):
            continue
        if shares_range(view.graph, str(node.target)):
            continue
        module = view.graph.get_submodule(str(node.target))
        active = module.active if isinstance(module, ActivationQuantizer) else None
        is_fixed = active is not None and active.has_fixed_grid
        if isinstance(module, ActivationQuantizer) and is_fixed:
            found[str(node.target)] = LearnedRange(module)
    return found


def _ignoring(value: Callable[[], Tensor]) -> Callable[[object], Tensor]:
    """A stand-in that takes no notice of what its quantizer was given."""
    return lambda _: value()
