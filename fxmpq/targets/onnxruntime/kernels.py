"""Reading back which kernels ONNX Runtime chose."""

from __future__ import annotations

import re
from collections import defaultdict

import onnx
from torch import fx

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, Member, Product
from fxmpq.targets.onnxruntime.layer_nodes import WrittenModel, layer_nodes
from fxmpq.targets.onnxruntime.rewrite_products import product_node

_MOVES_DATA = frozenset({"Transpose", "ReorderOutput"})
_VIEWS = frozenset({"Reshape", "Slice", "Transpose"})
_READ_LOW_BITS = frozenset({"MatMulNBits", "GatherBlockQuantized"})
_INTEGER = re.compile("^QLinear|Integer|NBits$")
_FUSED_AT_MOST = 4
_NUMBERED = re.compile(r"_token_\d+$")


class ExecutedKernels:
    """The kernels of a loaded model, by layer.

    Args:
        executed: The graph the runtime optimized, which is what it executes.
        written: The model as it is in the file.
        graph: The planned graph.
    """

    def __init__(
        self, executed: onnx.ModelProto, written: WrittenModel, graph: fx.GraphModule
    ) -> None:
        self._written = written
        self._written_nodes = layer_nodes(written, graph)
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._writers: dict[str, onnx.NodeProto] = {}
        for node in executed.graph.node:
            for name in node.input:
                self._readers[name].append(node)
            self._writers |= dict.fromkeys(node.output, node)
        # Where the runtime changes a node, it adds a number to its name; a layer may have one too.
        exact = {node.name: node for node in executed.graph.node if node.name}
        self._named = {_NUMBERED.sub("", name): node for name, node in exact.items()} | exact

    def quantized(self, member: Member, precision: Precision) -> tuple[str, str]:
        """The kernel of a quantized layer, and why it is not what was asked where it is not.

        A layer is found by its weight scales, which every integer kernel reads, as they are
        stored or spread over the kernel's blocks. Of the kernels on a weight that an embedding
        shares, those that look rows up are the embedding's. A product of two activations is found
        by its node's name.
        """
        kernels: list[str] = []
        reason = ""
        if isinstance(member, Product) and product_node(member) in self._named:
            kernels.append(self._named[product_node(member)].op_type)
        for node in self._scale_readers(member):
            if node.op_type == "DequantizeLinear":
                reason = "the runtime has no integer kernel for it and dequantizes its weights"
                kernels += [f"float {user}" for user in self._users(node)]
            else:
                kernels.append(node.op_type)
        bits = precision.weight_bits
        if not kernels:
            return self._from_stored(member, bits)
        if not reason and bits is not None and bits < 8 and not _READ_LOW_BITS & set(kernels):
            reason = f"stored in {bits} bits, widened to 8 when the file is loaded"
        return ", ".join(dict.fromkeys(kernels)), reason

    def _users(self, node: onnx.NodeProto) -> list[str]:
        """What computes with a node's result, past what only cuts or turns it."""
        found: list[str] = []
        for user in self._readers.get(node.output[0], []):
            found += self._users(user) if user.op_type in _VIEWS else [user.op_type]
        return found

    def _from_stored(self, member: Member, bits: int | None) -> tuple[str, str]:
        """The kernel of a layer whose weights were dequantized when the file was loaded."""
        kernel = self._of_experts(member) or self.in_float(member)
        if kernel == "float":
            return "unknown", "the graph that the runtime executes does not show it"
        return kernel, f"no integer kernel: stored in {bits} bits, float when the file is loaded"

    def _of_experts(self, member: Member) -> str:
        """The kernels that multiply by what is cut out of one stored weight, expert by expert."""
        if member.kind != "experts" or isinstance(member, Product):
            return ""
        scale = f"scale_{member.weight.replace('.', '_')}"
        written = self._written.users_of_stored([scale])
        found = [self._named.get(str(node.name)) for node in written]
        kernels = dict.fromkeys(node.op_type for node in found if node is not None)
        return ", ".join(f"float {kernel}" for kernel in kernels)

    def in_float(self, member: Member) -> str:
        """The kernel of a layer that stays float, or `float` where it cannot be told.

        A layer is found by the name of its node, by its result, or by that of what follows it
        and was fused with it.
        """
        node = self._written_nodes.get(member.name)
        if node is None:
            return "float"
        found = self._named.get(str(node.name)) or self._writer_of(node)
        if found is None:
            return "float"
        if found.op_type.startswith("Q"):
            return f"{found.op_type} on weights that the runtime quantized"
        return f"float {found.op_type}"

    def _writer_of(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The executed node that computes what a written one does, and maybe what follows it."""
        value = str(node.output[0])
        for _ in range(_FUSED_AT_MOST):
            # A convolution in blocks of channels is named after the result that it stands for.
            found = self._writers.get(value) or self._named.get(f"{value}_nchwc")
            while found is not None and found.op_type in _MOVES_DATA:
                found = self._writers.get(found.input[0])
            if found is not None:
                return found
            reader = self._written.sole_reader(value)
            if reader is None:
                return None
            value = str(reader.output[0])
        return None

    def _scale_readers(self, member: Member) -> list[onnx.NodeProto]:
        if not isinstance(member, Layer):
            return []
        scale = f"scale_{member.weight.replace('.', '_')}"
        spread = [name for node in self._written.readers(scale) for name in node.output]
        names = [scale, *(name for name in spread if self._written.is_constant(name))]
        readers = [node for name in names for node in self._readers.get(name, [])]
        if not readers and member.name in self._written_nodes:
            # Of equal scales the exporter stores one, with another layer's name.
            found = self._named.get(str(self._written_nodes[member.name].name))
            return [found] if found is not None and _INTEGER.search(found.op_type) else []
        is_look_up = member.kind == "embedding"
        return [node for node in readers if ("Gather" in node.op_type) == is_look_up]
