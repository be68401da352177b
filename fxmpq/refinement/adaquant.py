"""AdaQuant: weights, scales, bias and input range of a layer, trained together on its output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from fxmpq.graph.batches import Batch
from fxmpq.graph.operators import argument
from fxmpq.graph.state import Refinement
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.refinement.best_seen import BestSeen
from fxmpq.refinement.bias_correction import correct_bias
from fxmpq.refinement.descent import check_rates, check_steps, descend
from fxmpq.refinement.units import Units
from fxmpq.refinement.variables import FreeWeight, LearnedBias, LearnedRange, shares_range
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk

aten = torch.ops.aten


def adaquant(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    *,
    units: Units,
    steps: int = 200,
    sequential: bool = True,
    rectified: bool = True,
    weight_rate: float = 0.02,
    bias_rate: float = 1e-3,
    scale_rate: float = 1e-3,
    range_rate: float = 1e-3,
    seed: int = 0,
) -> list[Refinement]:
    """Train each layer's quantized weight, bias and input range towards its float output.

    For a layer with float input `x`, it minimises

        || f(W * x + b) - f(Q_w(W + V) * Q_x(x') + b') ||^2

    over the weight's change `V`, its scales, the bias `b'` and the range of `Q_x`, roundings
    straight through, by Adam on random batches. `f` is the ReLU that alone reads the layer, or
    the identity; `x'` is the layer's input in the model whose earlier layers are refined already,
    or the float input. Unlike AdaRound's, a weight may move by more than one step
    (Hubara et al. 2020, arXiv:2006.10518).

    The range of an input that several nodes read is left as it is: what is best for one reader
    may harm the others. The state with the least error on all batches is kept, which may be the
    one before. A weight that several layers share is trained for the first of them, and the
    others get the bias that goes with it. Weights of float format, embeddings and layers whose
    bias is computed are left alone.

    Cost: each step runs a layer forwards and backwards on one batch, and nine checks run it on
    all of them. A ResNet-20 took about 55 float passes for 100 steps on 1,024 images in batches
    of 64.

    Args:
        graph: With chosen precisions; its quantizers are changed.
        batches: Samples; a step takes one of them, so 32 to 128 samples each are best.
        units: Shows and keeps what is done.
        steps: Of Adam for each layer.
        sequential: Whether layers are trained on what earlier ones became, or all on float
            inputs.
        rectified: Whether a ReLU behind a layer belongs to the loss.
        weight_rate: Step of Adam for weights, in steps of their grid.
        bias_rate: For the bias, in root mean squares of the layer's float output.
        scale_rate: For the weight's scales, relative to them.
        range_rate: For the input's range, relative to it.
        seed: Of the order of batches.

    Returns:
        The relative squared error of each layer's output (behind its ReLU where that is part of
        the loss) before and after, on inputs as it was trained on; `after` is never more.

    Raises:
        FxmpqError: If `steps` is less than 1 or a rate is no finite number from 0 on.

    Examples:
        >>> import torch, fxmpq
        >>> batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(4, 2)), batches[0])
        >>> graph = fxmpq.prepare(graph, "reference", candidates=["w3a8", "w8a8"])
        >>> graph = fxmpq.calibrate(graph, batches, progress=False)
        >>> options = {"method": "adaquant", "steps": 20, "progress": False}
        >>> refined = fxmpq.refine(graph, {"0": "w3a8"}, batches, **options)
        >>> [found] = fxmpq.graph.state.state_of(refined).refinements
        >>> found.after <= found.before
        True
    """
    check_steps(steps)
    check_rates(
        weight_rate=weight_rate, bias_rate=bias_rate, scale_rate=scale_rate, range_rate=range_rate
    )
    rates = _Rates(weight_rate, bias_rate, scale_rate, range_rate)
    done = []
    for view in units.track(Walk(graph, batches).layers(), "adaquant"):
        if not _is_trainable(view):
            continue

        def compute(view: LayerView = view) -> Sequence[float]:
            if not view.is_first:
                return correct_bias(view)
            training = _Training(view, sequential=sequential, rectified=rectified)
            return training.run(rates, steps, seed)

        name = view.layer.name
        before, after = units.unit(f"adaquant {name}", graph, view.modules, compute)
        done.append(Refinement("adaquant", name, before, after))
    return done


class _Rates(NamedTuple):
    weight: float
    bias: float
    scale: float
    range: float


class _Training:
    """The loss of one layer and its variables.

    Args:
        view: The layer.
        sequential: Whether inputs come from the quantized model.
        rectified: Whether a ReLU behind the layer is part of the loss.
    """

    def __init__(self, view: LayerView, *, sequential: bool, rectified: bool) -> None:
        self._view = view
        self._is_rectified = rectified and _is_rectified(view.node)
        self._input_quantizer = _own_quantizer(view)
        self._inputs = [self._input(batch, sequential) for batch in range(len(view))]
        self._targets = [self._seen(view.float_output(batch)) for batch in range(len(view))]
        self._signal = sum(float(target.square().sum()) for target in self._targets)
        # A layer whose output is 0 has absolute errors.
        self._signal = self._signal if self._signal > 0 else 1.0
        self._power = self._signal / max(sum(target.numel() for target in self._targets), 1)

    def run(self, rates: _Rates, steps: int, seed: int) -> list[float]:
        """Train, and return the relative squared errors before and after."""
        view = self._view
        assert view.quantizer is not None
        self._weight = FreeWeight(view.quantizer, view.weight)
        self._bias = LearnedBias(view, math.sqrt(self._power))
        self._range = None
        if self._input_quantizer is not None:
            self._range = LearnedRange(self._input_quantizer)
        before = self._error()
        best = BestSeen(view.graph, view.modules, before)
        variables = [(self._weight.steps, rates.weight), (self._weight.scale_change, rates.scale)]
        variables.append((self._bias.change, rates.bias))
        if self._range is not None:
            changes = (self._range.scale_change, self._range.centre_change)
            variables += [(change, rates.range) for change in changes]
        descend(
            variables,
            lambda batch, _: self._loss(batch),
            best,
            self._harden,
            steps=steps,
            batches=len(self._inputs),
            seed=seed,
        )
        return [before, best.error]

    def _loss(self, batch: int) -> Tensor:
        x = self._inputs[batch]
        x = x if self._range is None else self._range(x)
        found = self._seen(self._view.output(x, self._weight.value(), self._bias.value()))
        return (found - self._targets[batch]).square().mean() / self._power

    def _harden(self) -> float:
        for variable in (self._weight, self._bias, self._range):
            if variable is not None:
                variable.write()
        return self._error()

    def _error(self) -> float:
        weight, bias = self._view.quantized_weight, self._view.quantized_bias
        noise = 0.0
        for x, target in zip(self._inputs, self._targets, strict=True):
            read = x if self._input_quantizer is None else self._input_quantizer(x)
            found = self._seen(self._view.output(read, weight, bias))
            noise += float((found - target).square().sum())
        return noise / self._signal

    def _input(self, batch: int, sequential: bool) -> Tensor:
        """What the layer reads: before its quantizer if that is trained, else behind it."""
        view = self._view
        if self._input_quantizer is not None:
            return view.raw_input(batch) if sequential else view.float_input(batch)
        if sequential:
            return view.input(batch)
        found = view.float_input(batch)
        if view.input_quantizer is not None:
            found = view.input_quantizer(found)
        return found

    def _seen(self, output: Tensor) -> Tensor:
        return output.relu() if self._is_rectified else output


def _is_rectified(node: fx.Node) -> bool:
    readers = list(node.users)
    return len(readers) == 1 and readers[0].target is aten.relu.default


def _is_trainable(view: LayerView) -> bool:
    """Whether a layer has a weight on an even grid, and a bias that can be trained."""
    is_even = view.number_format is not None and view.number_format.is_integer
    return is_even and view.correction is not None


def _own_quantizer(view: LayerView) -> ActivationQuantizer | None:
    """The input's quantizer if its range may be trained: an even grid that nobody else reads.

    One that shares its range with other tensors keeps it.
    """
    found, source = view.input_quantizer, argument(view.node, view.operator.input)
    is_own = isinstance(source, fx.Node) and len(source.users) == 1
    is_own = is_own and not shares_range(view.graph, view.layer.input_quantizer)
    is_even = found is not None and found.active is not None and found.active.has_fixed_grid
    return found if is_own and is_even else None
