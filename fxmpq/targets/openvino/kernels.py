"""Reading back which kernels OpenVINO chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field

import openvino as ov

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, Member, Product
from fxmpq.targets.openvino.translate import codes_name, quantization_name, widened_name

_LAYERS = frozenset(
    {
        "Convolution",
        "GroupConvolution",
        "ConvolutionBackpropData",
        "GroupConvolutionBackpropData",
        "MatMul",
        "Gather",
    }
)
_EXECUTED = frozenset(
    {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "Gather", "Subgraph"}
)
_REARRANGES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Broadcast"})
_CODES = frozenset({"i8", "u8", "i4", "u4", "u2"})

Operands = tuple[int, int]
"""Indices of the quantizations of what a product multiplies."""


@dataclass(frozen=True)
class _Kernel:
    """A kernel that runs: of which kind, which one, and the type of the values it reads."""

    kind: str
    primitive: str
    reads: str

    @property
    def is_integer(self) -> bool:
        """Whether it computes on integers; names end as in `brgconv_avx512_I8`."""
        return self.primitive.lower().endswith(("i8", "u8"))


def name_layers(model: ov.Model, layers: Sequence[Layer]) -> None:
    """Give the operations that compute layers the layers' names, in place.

    A layer is found by its stored codes, or by its weight where that is float and its own. A
    linear layer's bias is added by an operation of its own, which gives its name to the kernel
    where both run as one; it is named `<layer>/bias`. Slashes and commas in a layer's own name
    become underscores.

    Args:
        model: From `openvino_model`.
        layers: By their indices.
    """
    readers = Counter(layer.weight for layer in layers)
    names = {codes_name(index): _readable(layer.name) for index, layer in enumerate(layers)}
    weights = {
        f"{layer.weight.replace('.', '_')}:0": _readable(layer.name)
        for layer in layers
        if readers[layer.weight] == 1
    }
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        found = [weights[name] for name in node.output(0).get_names() if name in weights]
        name = names.get(node.get_friendly_name(), found[0] if found else None)
        if name is not None:
            for layer in _reached(node):
                _name(layer, name)


def name_products(model: ov.Model, products: Sequence[tuple[str, Operands]]) -> None:
    """Give the operations that multiply activations the products' names, in place.

    A product is found by the quantizations of its operands.

    Args:
        model: From `openvino_model`.
        products: Names, and the indices of both operands' quantizations, in graph order.
    """
    left = list(products)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        operands = [_quantization(value.get_node()) for value in node.input_values()]
        for product in left:
            if operands == [quantization_name(index) for index in product[1]]:
                name = _readable(product[0])
                node.set_friendly_name(name)
                readers = _readers(node)
                if len(readers) == 1 and _takes_constant(readers[0], "Multiply"):
                    # What scales a product by a number may give the kernel its name.
                    readers[0].set_friendly_name(f"{name}/scaled")
                left.remove(product)
                break


@dataclass(frozen=True)
class Kernels:
    """The kernels that the runtime chose.

    Args:
        executed: `CompiledModel.get_runtime_model()` of a model whose layers are named. Kernels
            for free sizes are only chosen when the model runs, so it should have run once.
        layers: By their indices: where the runtime lost a layer's name, as in front of a
            subtraction, its kernel is the one that reads its codes.
    """

    executed: InitVar[ov.Model]
    layers: InitVar[Sequence[Layer]] = ()
    _found: dict[str, list[_Kernel]] = field(default_factory=dict, init=False)

    def __post_init__(self, executed: ov.Model, layers: Sequence[Layer]) -> None:
        """Collect the kernels by the names of what they compute."""
        readers: dict[str, list[_Kernel]] = {}
        for node in executed.get_ordered_ops():
            kernel = _kernel_of(node)
            if kernel.kind not in _EXECUTED:
                continue
            for name in str(node.get_rt_info()["originalLayersNames"].value).split(","):
                # The runtime appends what it fused to names, as `/DequantizationMultiply`.
                _add(self._found, name.partition("/")[0], kernel)
            for operand in node.input_values():
                _add(readers, operand.get_node().get_friendly_name(), kernel)
        for index, layer in enumerate(layers):
            found = [*readers.get(codes_name(index), []), *readers.get(widened_name(index), [])]
            self._found.setdefault(_readable(layer.name), found)

    def of_quantized(self, layer: Member, precision: Precision) -> tuple[str, str]:
        """A quantized layer's kernel, and why it differs from what was asked where it does."""
        found = self._of(layer)
        if not found:
            return "unknown", "the graph that the runtime executes does not show it"
        if precision.activation is not None:
            is_met = all(kernel.is_integer for kernel in found)
            return _text(found), "" if is_met else "the runtime has no integer kernel for it"
        if all(kernel.reads in _CODES for kernel in found):
            return f"{_text(found)} on {found[0].reads} weights", ""
        return _text(found), "the runtime expands its weights to float"

    def of_float(self, layer: Member) -> str:
        """The kernel of a layer that stays float; `float` where it is not known."""
        return _text(self._of(layer)) or "float"

    def _of(self, member: Member) -> list[_Kernel]:
        """What computes a layer, or a product: fused attention is only a product's."""
        found = self._found.get(_readable(member.name), [])
        is_product = isinstance(member, Product)
        return [kernel for kernel in found if is_product or kernel.kind != "Subgraph"]


def _kernel_of(node: ov.Node) -> _Kernel:
    """What runs for a node of the graph that is executed."""
    keys = ("layerType", "primitiveType", "runtimePrecision")
    return _Kernel(*(str(node.get_rt_info()[key].value) for key in keys))


def _add(found: dict[str, list[_Kernel]], name: str, kernel: _Kernel) -> None:
    """Note a kernel under a name, once."""
    kernels = found.setdefault(name, [])
    kernels += [kernel] if kernel not in kernels else []


def _text(kernels: Sequence[_Kernel]) -> str:
    return ", ".join(f"{kernel.kind} {kernel.primitive}" for kernel in kernels)


def _readable(name: str) -> str:
    """A layer's name without what separates names in the graph that is executed."""
    return name.replace("/", "_").replace(",", "_")


def _name(layer: ov.Node, name: str) -> None:
    """Name a layer, and what adds its bias."""
    layer.set_friendly_name(name)
    readers = _readers(layer)
    if len(readers) == 1 and _takes_constant(readers[0], "Add"):
        readers[0].set_friendly_name(f"{name}/bias")


def _reached(constant: ov.Node) -> Iterator[ov.Node]:
    """The layers that read a constant, directly or through what only rearranges and scales it."""
    waiting = [constant]
    while waiting:
        for reader in _readers(waiting.pop()):
            if reader.get_type_name() in _LAYERS:
                yield reader
            elif reader.get_type_name() not in ("Result", "ShapeOf"):
                waiting.append(reader)


def _quantization(node: ov.Node) -> str | None:
    """The name of the operation that quantizes a value, past what only rearranges it."""
    while node.get_type_name() in _REARRANGES:
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name()) if node.get_type_name() == "FakeQuantize" else None


def _readers(node: ov.Node) -> list[ov.Node]:
    return [target.get_node() for output in node.outputs() for target in output.get_target_inputs()]


def _takes_constant(node: ov.Node, kind: str) -> bool:
    kinds = [value.get_node().get_type_name() for value in node.input_values()]
    return bool(node.get_type_name() == kind and "Constant" in kinds)
