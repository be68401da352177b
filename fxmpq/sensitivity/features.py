"""Features: what each group computes, as similarities between the samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.errors import CalibrationError
from fxmpq.graph.batches import Batch, batch_size, flat_inputs
from fxmpq.graph.layers import is_real_tensor
from fxmpq.graph.samples import SampleStrides, samples_first
from fxmpq.graph.state import node_shape, require
from fxmpq.quantizers.modules import ActivationQuantizer

aten = torch.ops.aten

# Elementwise operators to which torch gives no `pointwise` tag.
_UNTAGGED = frozenset(
    {
        aten.hardswish.default,
        aten.prelu.default,
        aten.rsub.Tensor,
        aten.rsub.Scalar,
    }
)

_CHUNK = 2**22
"""Feature values that are held in double precision at a time."""

_NO_VARIATION = 1e-12
"""Share of a feature's power below which its variation over samples is float32 rounding."""


def gram(features: Tensor, *, center: bool = True) -> Tensor:
    """Inner products between the features of every two samples, `K = F F^T`.

    Centred, the mean over samples is taken from every feature first, which is the same as
    `H K H` with `H = I - 1/n`. A centred feature that is the same for all samples, to within
    float32 rounding, gives exact zeros.

    Args:
        features: One sample a row, shape `[n, values]`.
        center: Whether to centre.

    Returns:
        Symmetric and positive semi-definite, `float64`, shape `[n, n]`.

    Examples:
        >>> gram(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]], dtype=torch.float64)
    """
    samples = features.shape[0]
    found = torch.zeros(samples, samples, dtype=torch.float64, device=features.device)
    power = torch.zeros((), dtype=torch.float64, device=features.device)
    for part in torch.split(features.detach(), max(1, _CHUNK // max(samples, 1)), dim=1):
        columns = part.double()
        power += columns.square().sum()
        if center:
            columns = columns - columns.mean(dim=0)
        found += columns @ columns.T
    if center and found.trace() <= _NO_VARIATION * power:
        return torch.zeros_like(found)
    return found


def feature_nodes(graph: fx.GraphModule) -> dict[str, tuple[fx.Node, ...]]:
    """The nodes whose values are the features of each group.

    From a layer's output the feature moves on to the one reader there is, as long as that is
    elementwise and keeps the shape: through activations, residual sums and gates. So a
    convolution before a ReLU gives what the ReLU returns, and the last one of a residual block
    the block's output. Where the ways of two layers meet, as in a residual sum, the layer with
    more layers before it (then the later one) goes on, and the other group's feature is what it
    had before they met. Batch norms are folded into layers by `trace`; one that could not be
    ends the way.

    Args:
        graph: A prepared graph.

    Returns:
        Group name to nodes, one a layer; layers of one group whose ways meet have one.
    """
    groups = require(graph, stage="prepared").groups
    nodes = {node.name: node for node in graph.graph.nodes}
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    owner = {member.node: group.name for group in groups for member in group.members}
    depth: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        before = max((depth[source] for source in node.all_input_nodes), default=0)
        depth[node] = before + (node.name in owner)
    layers = [nodes[name] for name in owner]
    claimed: dict[fx.Node, str] = {}
    features: dict[fx.Node, fx.Node] = {}
    for layer in sorted(layers, key=lambda node: (depth[node], order[node]), reverse=True):
        for node in _way(graph, layer):
            if claimed.setdefault(node, owner[layer.name]) != owner[layer.name]:
                break
            features[layer] = node
    return {
        group.name: tuple(dict.fromkeys(features[nodes[member.node]] for member in group.members))
        for group in groups
    }


def _way(graph: fx.GraphModule, layer: fx.Node) -> list[fx.Node]:
    """A layer's node and the elementwise nodes behind it that alone read what is before them."""
    way = [layer]
    while len(way[-1].users) == 1:
        reader = next(iter(way[-1].users))
        if not _is_elementwise(graph, reader) or node_shape(reader) != node_shape(layer):
            break
        way.append(reader)
    return way


def _is_elementwise(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), ActivationQuantizer)
    if not isinstance(node.target, torch._ops.OpOverload) or not is_real_tensor(node):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in _UNTAGGED


class FeatureGrams(fx.Interpreter):
    """Runs a graph and keeps of each feature only the similarities of its samples.

    A group's features are taken side by side, so their Gram matrices add up.

    Args:
        graph: A calibrated graph.
        center: Whether to centre; see `gram`.
    """

    def __init__(self, graph: fx.GraphModule, *, center: bool = True) -> None:
        super().__init__(graph)
        self._graph = graph
        self._center = center
        self._groups: dict[fx.Node, str] = {}
        for group, found in feature_nodes(graph).items():
            self._groups.update(dict.fromkeys(found, group))
        self._names = [group.name for group in require(graph, stage="calibrated").groups]
        self._strides = SampleStrides(graph)
        self._samples = 0
        self._grams: dict[str, Tensor] = {}

    def grams(self, batch: Batch) -> Tensor:
        """Gram matrix of every group on one batch, in the order of the groups.

        Args:
            batch: What the model takes.

        Returns:
            On the CPU, `float64`, shape `[groups, n, n]` for `n` samples.

        Raises:
            BatchError: If the batch does not fit the model.
            CalibrationError: If a feature holds NaN or infinite values.
        """
        inputs = flat_inputs(self._graph, batch)
        self._samples = batch_size(inputs)
        self._strides.start(self._samples)
        self._grams = {}
        with torch.inference_mode(False), torch.no_grad():
            self.run(*inputs, enable_io_processing=False)
        found, self._grams = self._grams, {}
        return torch.stack([found[name] for name in self._names])

    def run_node(self, n: fx.Node) -> object:
        """Run one node; at features, take the similarities of the samples."""
        result = super().run_node(n)
        self._strides.record(n, result)
        if n in self._groups:
            assert isinstance(result, Tensor)
            found = gram(self._by_sample(n, result), center=self._center).cpu()
            group = self._groups[n]
            if not torch.isfinite(found).all():
                raise CalibrationError(
                    f"the output of group {group!r} holds NaN or infinite values; check the "
                    "data's normalisation and the model's weights"
                )
            self._grams[group] = self._grams[group] + found if group in self._grams else found
        return result

    def _by_sample(self, node: fx.Node, values: Tensor) -> Tensor:
        """A sample a row; what the samples of a batch share is the row of each of them."""
        stride = self._strides.stride(node)
        if stride is None:
            return values.reshape(1, -1).expand(self._samples, -1)
        rows = samples_first(values, stride, self._samples, 0)
        assert rows is not None
        return rows.reshape(self._samples, -1)
