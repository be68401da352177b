"""What a graph carries besides its nodes: frozen, and replaced as a whole by each step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec

from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.findings import BiasUnits, Fusion, Join, Missed
from fxmpq.quantizers.rule import RuleChoice

_KEY = "fxmpq"


@dataclass(frozen=True)
class Layer:
    """One call of a weighted operator.

    Args:
        name: What users see and match, as `encoder.layer.0.attention.query`.
        kind: Key of the operator table, as `conv` or `linear`.
        node: Name of the call's node.
        weight: Qualified name of the weight.
        macs: Multiply-accumulates for one sample.
        weight_shape: Shape of the weight.
        channel_axis: The weight's output-channel dimension.
        weight_quantizer: Module name of its weight quantizer, once prepared.
        bias_correction: Module name of its bias correction, once prepared.
        input_quantizer: Module name of the quantizer it reads directly, if it does.
        bias_units: Of its bias, where the target stores it in integers.
    """

    name: str
    kind: str
    node: str
    weight: str
    macs: int
    weight_shape: tuple[int, ...]
    channel_axis: int
    weight_quantizer: str | None = None
    bias_correction: str | None = None
    input_quantizer: str | None = None
    bias_units: BiasUnits | None = None


@dataclass(frozen=True)
class Product:
    """One product of two activations, which has no weight.

    Args:
        name: What users see and match, as `encoder.layer.0.attention.scores`.
        node: Name of the call's node.
        macs: Multiply-accumulates for one sample.
        kind: Key of a target's rules.
    """

    name: str
    node: str
    macs: int
    kind: str = "matmul"


Member = Layer | Product


@dataclass(frozen=True)
class Group:
    """Layers and products that must share a precision, and the quantizers that switch with them.

    Args:
        name: Name of the first member.
        layers: Those with weights, in graph order.
        candidates: Precisions the target can run here, from few bits to many.
        activation_quantizers: Module names of the activation quantizers it owns.
        products: Products of two activations, in graph order; they take the activation half of
            the group's precision for both operands.
    """

    name: str
    layers: tuple[Layer, ...]
    candidates: tuple[Precision, ...]
    activation_quantizers: tuple[str, ...] = ()
    products: tuple[Product, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        """Its layers, then its products."""
        return (*self.layers, *self.products)

    def candidate(self, precision: str | Precision) -> Precision:
        """Return the candidate of this name, or raise with those there are."""
        wanted = Precision.parse(precision)
        if wanted not in self.candidates:
            legal = ", ".join(str(candidate) for candidate in self.candidates)
            raise FxmpqError(f"group {self.name!r} has no candidate {wanted}; it has {legal}")
        return wanted


@dataclass(frozen=True)
class LeftFloat:
    """Something that stays in float, and why.

    Args:
        name: The layer or operator.
        reason: Why, for people.
        macs: Multiply-accumulates for one sample, where it is in no group.
    """

    name: str
    reason: str
    macs: int = 0


@dataclass(frozen=True)
class Refinement:
    """What one refinement method did to one layer or block.

    Args:
        method: The method's name.
        layer: Name of the layer, or of the block's first; empty for the whole model.
        before: Relative squared error of its output before, `sum (y_q - y)^2 / sum y^2`.
        after: The same afterwards.
        weight_format: Name of the weight format that was refined by itself, before there was a
            plan; empty where a plan was refined.
    """

    method: str
    layer: str
    before: float
    after: float
    weight_format: str = ""


@dataclass(frozen=True)
class CalibrationOptions:
    """How a graph was calibrated, so that a later step can do it again.

    Args:
        ranges: The rule of activation ranges, a key of `RANGES`, with its options.
        weight_scales: The rule of weight scales, a key of `WEIGHT_SCALES`, with its options.
        bias_correction: Whether quantized layers get corrected biases.
    """

    ranges: RuleChoice
    weight_scales: RuleChoice
    bias_correction: bool = True


@dataclass(frozen=True)
class FixedSize:
    """A size that could have been free, but that the export fixed.

    Args:
        argument: Name of the input.
        dimension: 0 for the samples, 1 for the sequence.
        size: What it is fixed at.
        reason: Why, for people.
    """

    argument: str
    dimension: int
    size: int
    reason: str


@dataclass(frozen=True)
class GraphState:
    """Everything fxmpq knows of a graph.

    Args:
        call_spec: Structure of `(args, kwargs)`.
        example: Flat inputs of a small batch, on the CPU.
        dynamic: Whether batch size may vary.
        fingerprint: Hash of operators and weights of the float graph.
        target: The target it was prepared for.
        groups: In graph order.
        left_float: What stays in float.
        fusions: What the target runs as one, in graph order.
        joins: Why layers share a group.
        missed: Rules of the target that did not fire, and why.
        shared_ranges: Module names of activation quantizers that have one range.
        calibrated: Whether every quantizer has its ranges.
        calibration: How they were found, once they are.
        choices: Precision per group, once a plan is applied.
        refinements: What was refined, in order.
        fixed_sizes: Sizes of samples and sequences that the export fixed, and why.
    """

    call_spec: TreeSpec
    example: tuple[object, ...]
    dynamic: bool
    fingerprint: str
    target: str | None = None
    groups: tuple[Group, ...] = ()
    left_float: tuple[LeftFloat, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    joins: tuple[Join, ...] = ()
    missed: tuple[Missed, ...] = ()
    shared_ranges: tuple[tuple[str, ...], ...] = ()
    calibrated: bool = False
    calibration: CalibrationOptions | None = None
    choices: dict[str, str] = field(default_factory=dict)
    refinements: tuple[Refinement, ...] = ()
    fixed_sizes: tuple[FixedSize, ...] = ()

    def group(self, name: str) -> Group:
        """The group of this name."""
        return next(group for group in self.groups if group.name == name)


def is_traced(graph: fx.GraphModule) -> bool:
    """Whether a graph came from `fxmpq.trace`."""
    return isinstance(graph.meta.get(_KEY), GraphState)


def state_of(graph: fx.GraphModule) -> GraphState:
    """The state of a traced graph.

    Raises:
        FxmpqError: If the module did not come from `fxmpq.trace`.
    """
    state = graph.meta.get(_KEY) if isinstance(graph, fx.GraphModule) else None
    if not isinstance(state, GraphState):
        raise FxmpqError(
            f"expected a graph from fxmpq.trace, found {type(graph).__name__}; "
            "call fxmpq.trace(model, batch) first"
        )
    return state


def require(graph: fx.GraphModule, *, stage: str) -> GraphState:
    """The state of a graph that has reached `stage`: `traced`, `prepared` or `calibrated`.

    Raises:
        FxmpqError: If a step is missing, naming it.
    """
    state = state_of(graph)
    if stage in ("prepared", "calibrated") and state.target is None:
        raise FxmpqError("the graph has no quantizers yet; call fxmpq.prepare(graph, target) first")
    if stage == "calibrated" and not state.calibrated:
        raise FxmpqError(
            "the quantizers have no ranges yet; call fxmpq.calibrate(graph, batches) first"
        )
    return state


def require_groups(graph: fx.GraphModule, *, stage: str) -> GraphState:
    """The state of a graph that has reached `stage`, and has something to quantize.

    Raises:
        FxmpqError: If a step is missing, or the graph has no group.
    """
    state = require(graph, stage=stage)
    if not state.groups:
        raise FxmpqError(
            "the graph has nothing to quantize: no convolution, linear layer or embedding with a "
            "stored weight; `fxmpq inspect` lists what stays in float, and why"
        )
    return state


def with_state(graph: fx.GraphModule, state: GraphState) -> fx.GraphModule:
    """Attach a state and return the graph."""
    graph.meta[_KEY] = state
    return graph


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph's nodes and modules; tensors, which no step changes in place, are shared.

    Parameters are new ones of the same memory, so that moving a graph to another device, which
    changes its parameters in place, leaves the other one where it is.
    """
    memo: dict[int, object] = {id(buffer): buffer for buffer in graph.buffers()}
    with torch.inference_mode(False):
        for parameter in graph.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    state = graph.meta.get(_KEY)
    # torch warns when the trees that describe the call are copied.
    for frozen in (state, *(vars(graph).get(name) for name in ("_in_spec", "_out_spec"))):
        memo[id(frozen)] = frozen
    for node in graph.graph.nodes:
        for value in node.meta.values():
            memo[id(value)] = value
    duplicate = copy.deepcopy(graph, memo)
    if state is not None:
        with_state(duplicate, state)
    return duplicate


def node_shape(node: fx.Node) -> torch.Size | None:
    """Shape of a node's tensor on the example batch, or `None` if it is no tensor."""
    shape = node.meta.get("example_shape")
    return shape if isinstance(shape, torch.Size) else None
