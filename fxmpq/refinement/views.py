"""What a walk hands out: a layer or a block with its inputs, float and quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, fx

from fxmpq.formats import NumberFormat
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.state import Group, Layer, require
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.refinement.relative_error import relative_error

if TYPE_CHECKING:
    from fxmpq.refinement.blocks import Block
    from fxmpq.refinement.walk import Walk

Module = TypeVar("Module", bound=torch.nn.Module)


class QuantizedLayer:
    """A layer of a planned graph with its quantizers.

    Args:
        graph: With chosen precisions.
        group: The group that owns the layer.
        layer: One of the group's.
        node: The layer's call.
    """

    def __init__(self, graph: fx.GraphModule, group: Group, layer: Layer, node: fx.Node) -> None:
        self.graph = graph
        self.group = group
        self.layer = layer
        self.node = node
        self.operator = OPERATORS[node.target]

    @property
    def quantizer(self) -> WeightQuantizer | None:
        """Of the weight; `None` if the layer stays float whatever the plan."""
        return self._module(self.layer.weight_quantizer, WeightQuantizer)

    @property
    def correction(self) -> BiasCorrection | None:
        """Of the bias; `None` where the bias is computed or impossible."""
        return self._module(self.layer.bias_correction, BiasCorrection)

    @property
    def input_quantizer(self) -> ActivationQuantizer | None:
        """Of the input, if the layer reads a quantizer directly and that one is on."""
        found = self._module(self.layer.input_quantizer, ActivationQuantizer)
        return found if found is not None and found.active is not None else None

    @property
    def number_format(self) -> NumberFormat | None:
        """Format that the plan gives the weight; `None` for float."""
        return None if self.quantizer is None else self.quantizer.active

    @property
    def is_quantized(self) -> bool:
        """Whether the plan quantizes the weight."""
        return self.number_format is not None

    @property
    def weight(self) -> Tensor:
        """The float weight."""
        return get_tensor(self.graph, self.layer.weight).detach()

    @property
    def quantized_weight(self) -> Tensor:
        """The weight as the plan has it now, in real numbers."""
        assert self.quantizer is not None
        found: Tensor = self.quantizer(self.weight)
        return found.detach()

    @property
    def float_bias(self) -> Tensor | None:
        """The stored bias without corrections, shape `[channels]`; `None` where there is none."""
        node = argument(self.node, self.operator.bias)
        if self.correction is not None and isinstance(node, fx.Node):
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        return get_tensor(self.graph, str(node.target)).detach()

    @property
    def quantized_bias(self) -> Tensor | None:
        """The bias with its correction, as the plan has it now."""
        if self.correction is None:
            return self.float_bias
        found = self.correction(self.float_bias)
        assert found is None or isinstance(found, Tensor)
        return found

    def set_bias(self, bias: Tensor) -> None:
        """Let the layer add this bias, shape `[channels]`, at its weight format from now on."""
        assert self.correction is not None and self.number_format is not None
        before = self.float_bias
        shift = bias if before is None else bias - before
        self.correction.set_shift(self.number_format, shift.detach().clone())
        self.correction.activate(self.number_format)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the weight quantizer, bias correction and input quantizer that it has."""
        layer = self.layer
        names = (layer.weight_quantizer, layer.bias_correction, layer.input_quantizer)
        return tuple(name for name in names if name is not None)

    def _module(self, name: str | None, kind: type[Module]) -> Module | None:
        if name is None:
            return None
        found = self.graph.get_submodule(name)
        assert isinstance(found, kind)
        return found


class LayerView(QuantizedLayer):
    """A layer that a walk has come to, with its inputs on every batch, until the walk goes on.

    Args:
        walk: Stands just before the layer.
        group: The group that owns the layer.
        layer: One of the group's.
        node: The layer's call.
        is_first: Whether no earlier layer has the same weight.
    """

    def __init__(
        self, walk: Walk, group: Group, layer: Layer, node: fx.Node, *, is_first: bool
    ) -> None:
        super().__init__(walk.graph, group, layer, node)
        self.is_first = is_first
        self._walk = walk

    def __len__(self) -> int:
        return len(self._walk)

    def input(self, batch: int) -> Tensor:
        """What the layer reads in one batch, earlier layers and its own input quantized."""
        return self._value(argument(self.node, self.operator.input), batch, quantized=True)

    def float_input(self, batch: int) -> Tensor:
        """What the layer reads in one batch in the float model."""
        return self._value(argument(self.node, self.operator.input), batch, quantized=False)

    def raw_input(self, batch: int) -> Tensor:
        """What its input quantizer reads in one batch; `input` where it has none."""
        source = argument(self.node, self.operator.input)
        if self.input_quantizer is not None and isinstance(source, fx.Node):
            source = source.args[0]
        return self._value(source, batch, quantized=True)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run the layer's operator on an input, a weight and a bias of one's own.

        Args:
            x: Like `input`.
            weight: In the shape of `weight`.
            bias: Shape `[channels]`, or `None`.

        Returns:
            The layer's output, with gradients where the arguments have them.
        """
        return self._call(list(self.node.args), x, weight, bias)

    def _call(self, args: list[object], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        args[self.operator.input] = x
        args[self.operator.weight] = weight
        position = self.operator.bias
        if position is not None and (bias is not None or position < len(args)):
            args += [None] * (position + 1 - len(args))
            args[position] = bias
        assert callable(self.node.target)
        found = self.node.target(*args, **self.node.kwargs)
        assert isinstance(found, Tensor)
        return found

    def float_output(self, batch: int) -> Tensor:
        """The layer's output in one batch in the float model: the target of refinement."""
        found = self._walk.float_result(self.node, batch)
        assert isinstance(found, Tensor)
        return found

    def quantized_output(self, batch: int) -> Tensor:
        """The layer's output in one batch as the plan has the model now."""
        return self._quantized_output(batch, self.quantized_weight)

    def error(self) -> float:
        """Relative squared error of the layer's output, `sum (y_q - y)^2 / sum y^2`."""
        with torch.no_grad():
            output = partial(self._quantized_output, weight=self.quantized_weight)
            return relative_error(output, self.float_output, len(self))

    def _quantized_output(self, batch: int, weight: Tensor) -> Tensor:
        # Experts also read which rows are whose.
        own = (self.operator.input, self.operator.weight, self.operator.bias)
        args = [
            self._walk.value(entry, batch, quantized=True)
            if isinstance(entry, fx.Node) and position not in own
            else entry
            for position, entry in enumerate(self.node.args)
        ]
        return self._call(args, self.input(batch), weight, self._bias(batch))

    def _bias(self, batch: int) -> Tensor | None:
        """What the layer adds in one batch, as the plan has it now; it may be computed."""
        source = argument(self.node, self.operator.bias)
        if not isinstance(source, fx.Node):
            return None
        found = self._walk.value(source, batch, quantized=True)
        assert found is None or isinstance(found, Tensor)
        return found

    def _value(self, source: object, batch: int, *, quantized: bool) -> Tensor:
        assert isinstance(source, fx.Node)
        found = self._walk.value(source, batch, quantized=quantized)
        assert isinstance(found, Tensor)
        return found


class BlockView:
    """A block that a walk has come to; its inputs are there until the walk goes on.

    Args:
        walk: Stands just before the block.
        block: What to run.

    Attributes:
        layers: Its quantized layers that have a part in its output, in graph order.
    """

    def __init__(self, walk: Walk, block: Block) -> None:
        self.block = block
        self.graph = walk.graph
        self._walk = walk
        members = {
            layer.node: (group, layer)
            for group in require(walk.graph, stage="calibrated").groups
            for layer in group.layers
        }
        needed = {block.output}
        for node in reversed(block.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        found = [
            QuantizedLayer(walk.graph, *members[node.name], node)
            for node in block.nodes
            if node.name in members and node in needed
        ]
        self.layers = tuple(layer for layer in found if layer.is_quantized)

    def __len__(self) -> int:
        return len(self._walk)

    @property
    def name(self) -> str:
        """Of its first quantized layer."""
        return self.layers[0].layer.name

    def float_output(self, batch: int) -> Tensor:
        """The block's output in one batch in the float model: the target of refinement."""
        with torch.no_grad():
            return self._run(batch, {}, quantized=False)

    def output(
        self, batch: int, overrides: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> Tensor:
        """The block's output in one batch, from quantized inputs through quantized layers.

        Args:
            batch: Number of the batch.
            overrides: Stand-ins for quantizer modules of the block, by module name; gradients
                flow through them. Stand-ins for bias corrections get the bias, or `None`.
        """
        return self._run(batch, overrides or {}, quantized=True)

    def error(self) -> float:
        """Relative squared error of the block's output, `sum (y_q - y)^2 / sum y^2`."""
        with torch.no_grad():
            return relative_error(self.output, self.float_output, len(self))

    def _run(
        self,
        batch: int,
        overrides: Mapping[str, Callable[[Tensor], Tensor]],
        *,
        quantized: bool,
    ) -> Tensor:
        values = self._walk.run(self.block.nodes, batch, quantized=quantized, overrides=overrides)
        found = values[self.block.output]
        assert isinstance(found, Tensor)
        return found
