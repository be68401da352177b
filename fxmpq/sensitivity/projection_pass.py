"""One float pass and its backward pass, with hooks that project local errors as gradients come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.batches import batch_size
from fxmpq.graph.operators import OPERATORS, argument
from fxmpq.graph.run import flatten_outputs
from fxmpq.graph.samples import SampleStrides, samples_first, sum_per_sample
from fxmpq.graph.state import Group, Layer, require
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.sensitivity.changes import WeightChanges, weight_changes
from fxmpq.sensitivity.probes import draw_probes
from fxmpq.sensitivity.weight_projection import WEIGHT_PROJECTIONS

_Hook = Callable[[Tensor], None]


class ProjectionPass(fx.Interpreter):
    """Runs the float graph with hooks that turn gradients into projections as they arrive.

    Local errors live only inside a hook. A rounded activation lives from the first layer that
    reads it, in backward order, to the quantizer that rounds it.

    Args:
        graph: A calibrated graph.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        state = require(graph, stage="calibrated")
        self._graph = graph
        self._layers: dict[str, tuple[Group, Layer]] = {}
        self._quantizers: dict[str, Group] = {}
        self._columns: dict[str, slice] = {}
        width = 0
        for group in state.groups:
            self._columns[group.name] = slice(width, width + len(group.candidates))
            width += len(group.candidates)
            if group.candidates == (Precision(),):
                continue
            self._layers.update({layer.node: (group, layer) for layer in group.layers})
            self._quantizers.update(dict.fromkeys(group.activation_quantizers, group))
        self._width = width
        self._strides = SampleStrides(graph)
        self._samples = 0
        self._rows = torch.empty(0)
        self._rounded: dict[tuple[str, NumberFormat], Tensor] = {}

    def project(
        self, inputs: list[object], probes: int, *, seed: int, first_sample: int
    ) -> tuple[Tensor, Tensor]:
        """Project the local errors of every group and candidate on one batch.

        Args:
            inputs: Flat inputs.
            probes: Directions per sample; fewer are drawn where fewer are exact.
            seed: Of the probes.
            first_sample: Number of the batch's first sample.

        Returns:
            `a_nr = v_nr^T J_n d_n`, `[samples, probes, entries]`, and the power `||y_n||^2` of
            the outputs, `[samples]` in double precision.
        """
        self._samples = batch_size(inputs)
        self._strides.start(self._samples)
        rows = []
        with torch.inference_mode(False), torch.enable_grad():
            outputs = self.run(*inputs, enable_io_processing=False)
            flat = flatten_outputs(outputs, self._samples)
            directions = draw_probes(flat, probes, seed=seed, first_sample=first_sample)
            for left, direction in zip(range(len(directions))[::-1], directions, strict=True):
                self._rows = torch.zeros(self._samples, self._width)
                # Outputs that no quantizer reaches suffer from none.
                if flat.requires_grad:
                    torch.autograd.backward(flat, direction, retain_graph=left > 0)
                rows.append(self._rows)
                self._rounded.clear()
            powers = flat.detach().double().square().sum(dim=1).cpu()
        return torch.stack(rows, dim=1), powers

    def get_attr(self, target: object, args: object, kwargs: object) -> object:
        """Read a tensor without letting gradients flow into it."""
        value = super().get_attr(target, args, kwargs)  # type: ignore[arg-type]
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> object:
        """Run one node; at layers and quantizers, wait for the gradient of the result."""
        result = super().run_node(n)
        self._strides.record(n, result)
        if n.op == "call_module" and str(n.target) in self._quantizers:
            assert isinstance(result, Tensor)
            if result.requires_grad or not self._read_by_layers(n):
                x = result.detach()
                result = result.view_as(result) if result.requires_grad else x.clone()
                _on_gradient(result.requires_grad_(), self._quantizer_hook(n, x))
        elif n.name in self._layers:
            assert isinstance(result, Tensor)
            result = result if result.requires_grad else result.detach().requires_grad_()
            _on_gradient(result, self._layer_hook(n))
        return result

    def _quantizer_hook(self, node: fx.Node, x: Tensor) -> _Hook:
        """Adds `<gradient, Q_c(x) - x>` for every candidate of the owning group."""
        group = self._quantizers[str(node.target)]
        name = str(node.target)
        quantizer = self._quantizer(name)
        stride = self._strides.stride(node)

        def hook(gradient: Tensor) -> None:
            columns = self._rows[:, self._columns[group.name]]
            for number_format in quantizer.formats:
                rounded = self._rounded.pop((name, number_format), None)
                if rounded is None:
                    rounded = quantizer.quantize(x, number_format)
                products = self._per_sample((rounded - x).mul_(gradient), stride)
                for index, candidate in enumerate(group.candidates):
                    if candidate.activation == number_format:
                        columns[:, index] += products

        return hook

    def _layer_hook(self, node: fx.Node) -> _Hook:
        """Adds the projections of weight and bias changes for every candidate of the group."""
        group, layer = self._layers[node.name]
        operator = OPERATORS[node.target]
        source = argument(node, operator.input)
        assert isinstance(source, fx.Node)
        x = self.env[source]
        assert isinstance(x, Tensor)
        # Nothing lies before the model's input: pushing its error forward through the layer is
        # cheaper than a gradient with respect to the input.
        push_input_error = layer.input_quantizer is not None and not x.requires_grad
        x = x.detach()
        strides = self._strides.stride(source), self._strides.stride(node)
        rest = self._further_arguments(node)

        def hook(gradient: Tensor) -> None:
            read, indices = (None, x)
            if layer.kind == "embedding":
                # Of a table, only the rows that the batch reads are rounded.
                read, indices = torch.unique(x, return_inverse=True)
            changes = weight_changes(self._graph, layer, read)
            columns = self._rows[:, self._columns[group.name]]
            for activation in dict.fromkeys(c.activation for c in group.candidates):
                seen = self._seen_input(layer, indices, activation, keep=not push_input_error)
                found = self._weight_projections(layer, seen, gradient, changes, rest, strides)
                if push_input_error and activation is not None:
                    pushed = self._pushed(node, seen - x, rest) * gradient
                    found = found + self._per_sample(pushed, strides[1]).unsqueeze(1)
                for index, candidate in enumerate(group.candidates):
                    if candidate.activation == activation and candidate.weight is not None:
                        columns[:, index] += found[:, changes.formats.index(candidate.weight)]

        return hook

    def _weight_projections(
        self,
        layer: Layer,
        x: Tensor,
        gradient: Tensor,
        changes: WeightChanges,
        arguments: Sequence[object],
        strides: tuple[int | None, int | None],
    ) -> Tensor:
        is_map = layer.kind in ("conv", "conv_transpose") and x.dim() < changes.weights.dim() - 1
        if is_map:
            # One map without a batch dimension, such as a parameter: all samples share it.
            x, gradient, strides = x[None], gradient[None], (None, None)
        rows = _rows_by_sample(layer.kind, x, gradient, strides, self._samples)
        x, gradient = rows or (x, gradient)
        samples = 1 if rows is None else self._samples
        projection = WEIGHT_PROJECTIONS[layer.kind]
        found = projection(x, gradient, changes.weights, arguments, samples)
        if changes.shifts is not None:
            channels = gradient if layer.kind == "linear" else gradient.movedim(1, -1)
            per_channel = channels.reshape(samples, -1, channels.shape[-1]).sum(dim=1)
            found = found + per_channel @ changes.shifts.T
        return self._shared(found.cpu()) if rows is None else found.cpu()

    def _read_by_layers(self, node: fx.Node) -> bool:
        return all(reader.name in self._layers for reader in node.users)

    def _further_arguments(self, node: fx.Node) -> tuple[object, ...]:
        """What a call passes behind its operands; a summand has no part in changes."""
        values = fx.node.map_arg(node.args[_operands(node) :], self.env.__getitem__)
        return tuple(
            None if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in values
        )

    def _pushed(self, node: fx.Node, error: Tensor, rest: Sequence[object]) -> Tensor:
        """What a change of a layer's input makes of its output."""
        operator = OPERATORS[node.target]
        assert callable(node.target)
        args = [*node.args[: _operands(node)], *rest]
        args[operator.input] = error
        args[operator.weight] = get_tensor(self._graph, self._layers[node.name][1].weight).detach()
        if operator.bias is not None and len(args) > operator.bias:
            args[operator.bias] = None
        pushed = node.target(*args, **node.kwargs)
        assert isinstance(pushed, Tensor)
        return pushed

    def _seen_input(
        self, layer: Layer, x: Tensor, activation: NumberFormat | None, *, keep: bool
    ) -> Tensor:
        """The layer's input in an activation format, where a quantizer feeds it directly.

        Other layers that read it, and the quantizer's own hook, find it again if it is kept.
        """
        name = layer.input_quantizer
        if activation is None or name is None:
            return x
        quantizer = self._quantizer(name)
        if activation not in quantizer.formats:
            return x
        rounded = self._rounded.get((name, activation))
        if rounded is None:
            rounded = quantizer.quantize(x, activation)
            if keep:
                self._rounded[name, activation] = rounded
        return rounded

    def _quantizer(self, name: str) -> ActivationQuantizer:
        quantizer = self._graph.get_submodule(name)
        assert isinstance(quantizer, ActivationQuantizer)
        return quantizer

    def _per_sample(self, products: Tensor, stride: int | None) -> Tensor:
        """Sum products over everything but samples; a tensor shared by the batch is split."""
        if stride is not None:
            return sum_per_sample(products, stride, self._samples).cpu()
        return self._shared(products.sum().reshape(1, 1).cpu()).reshape(-1)

    def _shared(self, total: Tensor) -> Tensor:
        """Spread one batch-wide projection so that its squares still add up to its square.

        Probes are independent between samples, so the squared sum is already an unbiased
        estimate of the sum of squares.
        """
        spread: Tensor = total.expand(self._samples, -1) / self._samples**0.5
        return spread


def _operands(node: fx.Node) -> int:
    """How many arguments are input, weight and bias."""
    operator = OPERATORS[node.target]
    return max(operator.input, operator.weight, operator.bias or 0) + 1


def _rows_by_sample(
    kind: str,
    x: Tensor,
    gradient: Tensor,
    strides: tuple[int | None, int | None],
    samples: int,
) -> tuple[Tensor, Tensor] | None:
    """A layer's input and gradient with samples in front; `None` if samples share the rows."""
    whole_maps = x.dim() - 1
    rows = {"linear": (1, 1), "embedding": (0, 1)}.get(kind, (whole_maps, whole_maps))
    if strides[0] is None or strides[1] is None or kind == "experts":
        return None
    inputs = samples_first(x, strides[0], samples, rows[0])
    slopes = samples_first(gradient, strides[1], samples, rows[1])
    return None if inputs is None or slopes is None else (inputs, slopes)


def _on_gradient(tensor: Tensor, hook: _Hook) -> None:
    """Call `hook` with the gradient at a tensor as the backward pass reaches it."""
    tensor.register_hook(hook)  # type: ignore[no-untyped-call]
