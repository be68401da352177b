"""Which nodes of an ONNX file compute which layers, and where their results can be seen."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.state import Layer, state_of
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.targets.equal_calls import value_numbers
from fxmpq.targets.lowering import quantizer_of

aten = torch.ops.aten

_LOOK_UPS = frozenset({"Gather", "GatherBlockQuantized"})


class WrittenModel:
    """A model as it is written, before the runtime optimizes it.

    Args:
        model: The model.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = list(model.graph.node)
        self._readers: dict[str, list[int]] = defaultdict(list)
        self._outputs = {entry.name for entry in model.graph.output}
        self._stored = {entry.name: entry for entry in model.graph.initializer}
        self._constants = {*self._stored, ""}
        for position, node in enumerate(self._nodes):
            for name in dict.fromkeys(node.input):
                self._readers[name].append(position)
            if all(name in self._constants for name in node.input):
                self._constants.update(node.output)

    def made_by(self, operator: str) -> set[str]:
        """The values that nodes of an operator compute."""
        return {name for node in self._nodes if node.op_type == operator for name in node.output}

    def readers(self, value: str) -> list[onnx.NodeProto]:
        """The nodes that read a value, in order."""
        return [self._nodes[position] for position in self._readers.get(value, [])]

    def sole_reader(self, value: str) -> onnx.NodeProto | None:
        """The node that reads a value, or `None` if something else sees it too."""
        found = self.readers(value)
        return found[0] if len(found) == 1 and value not in self._outputs else None

    def is_constant(self, value: str) -> bool:
        """Whether a value is stored, or made of stored ones only."""
        return value in self._constants

    def stored_transposes(self, tensor: Tensor) -> list[str]:
        """Names of the stored tensors that are a matrix's transpose."""
        if tensor.dim() != 2:
            return []
        transposed = tensor.detach().cpu().numpy().T
        return [
            name
            for name, entry in self._stored.items()
            if tuple(entry.dims) == transposed.shape
            and np.array_equal(onnx.numpy_helper.to_array(entry), transposed)
        ]

    def stored_codes(self, weight: str) -> list[str]:
        """Names of the stored tensors that hold a weight's codes."""
        flat = re.escape(weight.replace(".", "_"))
        pattern = re.compile(rf"(?:codes|codes_\d+bit\d*|packed_\d+bit)_{flat}_*")
        return [name for name in self._stored if pattern.fullmatch(name)]

    def users_of_stored(self, names: Sequence[str]) -> list[onnx.NodeProto]:
        """Nodes in which stored values, or what is made of them, meet the model's data, in order.

        Args:
            names: Of the stored values; those that are not there are passed over.
        """
        found: set[int] = set()
        waiting = [position for name in names for position in self._readers.get(name, [])]
        while waiting:
            position = waiting.pop()
            node = self._nodes[position]
            if all(self.is_constant(name) for name in node.input):
                waiting += [user for name in node.output for user in self._readers.get(name, [])]
            else:
                found.add(position)
        return [self._nodes[position] for position in sorted(found)]


def layer_nodes(written: WrittenModel, graph: fx.GraphModule) -> dict[str, onnx.NodeProto]:
    """Find the node that computes each layer.

    A layer is found by its weight's codes, which are its own, as their scales need not be: of
    equal ones the exporter stores one. Where there are none, as in a look-up or after the exporter
    made one of small equal ones, it is found by its scales, or its weight where that is float,
    which the exporter may have transposed. Calls that share a weight are told apart by their
    order; those that compute the same share a node, since the exporter makes one of them.

    Args:
        written: The model as it is written.
        graph: The planned graph.

    Returns:
        Node by layer name; without layers that are not found, as where the exporter computed
        with their weight.
    """
    nodes: dict[str, onnx.NodeProto] = {}
    numbers = value_numbers(graph)
    calls: dict[tuple[str, bool], list[Layer]] = defaultdict(list)
    for layer in _in_graph_order(graph):
        calls[layer.weight, layer.kind == "embedding"].append(layer)
    for (weight, is_look_up), sharing in calls.items():
        scale = f"scale_{weight.replace('.', '_')}"
        # A call that needs scales of its own stores them under the same name, longer.
        stored = [scale + "_" * count for count in range(len(sharing) + 1)]
        codes = [] if is_look_up else written.stored_codes(weight)
        users = written.users_of_stored(codes or [*stored, weight])
        users = [user for user in users if (user.op_type in _LOOK_UPS) == is_look_up]
        if not users:
            users = written.users_of_stored(written.stored_transposes(get_tensor(graph, weight)))
        computed = [numbers[layer.node] for layer in sharing]
        if len(users) == len(sharing):
            computed = list(range(len(sharing)))
        places = {number: place for place, number in enumerate(dict.fromkeys(computed))}
        if len(users) == len(places):
            found = [users[places[number]] for number in computed]
            nodes |= {layer.name: user for layer, user in zip(sharing, found, strict=True)}
    return nodes


def visible_value(
    written: WrittenModel,
    node: onnx.NodeProto,
    graph: fx.GraphModule,
    planned: fx.Node,
    layer: Layer,
) -> tuple[str, str]:
    """Where a layer's result can be seen without changing the kernel that computes it.

    Kernels on integers write codes, behind a fused ReLU if there is one: what their readers
    dequantize is the first that can be seen. Other layers show their own result.

    Args:
        written: The model as it is written.
        node: That computes the layer.
        graph: The planned graph.
        planned: Its node that computes the layer.
        layer: The layer.

    Returns:
        The name of the planned graph's node, and that of the written model's value.
    """
    value = _own_result(written, node, layer)
    while len(planned.users) == 1:
        follower = next(iter(planned.users))
        reader = written.sole_reader(value)
        quantizer = quantizer_of(graph, follower)
        if isinstance(quantizer, ActivationQuantizer) and quantizer.active is None:
            planned = follower
        elif reader is None:
            break
        elif follower.target is aten.relu.default and reader.op_type == "Relu":
            planned, value = follower, reader.output[0]
        elif isinstance(quantizer, ActivationQuantizer) and reader.op_type == "QuantizeLinear":
            back = [user for user in written.readers(reader.output[0]) if _is_dequantize(user)]
            return (follower.name, back[0].output[0]) if back else (planned.name, value)
        else:
            break
    return planned.name, value


def _in_graph_order(graph: fx.GraphModule) -> list[Layer]:
    layers = [layer for group in state_of(graph).groups for layer in group.layers]
    order = {node.name: position for position, node in enumerate(graph.graph.nodes)}
    return sorted(layers, key=lambda layer: order[layer.node])


def _own_result(written: WrittenModel, node: onnx.NodeProto, layer: Layer) -> str:
    """A layer's result where the file has several nodes for it."""
    value = str(node.output[0])
    reader = written.sole_reader(value)
    if node.op_type == "Gather" and any("scale_" in name for name in node.input):
        # Rows of codes are multiplied by their scales, which were looked up and unsqueezed.
        while reader is not None and reader.op_type in ("Unsqueeze", "Mul"):
            value = str(reader.output[0])
            if reader.op_type == "Mul":
                break
            reader = written.sole_reader(value)
    elif node.op_type == "GatherBlockQuantized":
        is_filled = layer.weight_shape[1] % _integer(node, "block_size") != 0
        if is_filled and reader is not None and reader.op_type == "Slice":
            value = str(reader.output[0])
    elif node.op_type == "MatMul" and reader is not None and reader.op_type == "Add":
        is_bias = any(written.is_constant(name) for name in reader.input)
        value = str(reader.output[0]) if is_bias else value
    return value


def _is_dequantize(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "DequantizeLinear")


def _integer(node: onnx.NodeProto, name: str) -> int:
    return next(int(entry.i) for entry in node.attribute if entry.name == name)
