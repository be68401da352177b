from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxmpq.costs.stored_values import StoredValues, find_stored_values
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE


class Views(nn.Module):
    """Reshaped, transposed, sliced and split tensors, and a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        first, second = hidden.reshape(-1, 2, 3).transpose(1, 2).split([1, 2], dim=1)
        shift = torch.tanh(self.table) * x.shape[0]
        return (second * first + shift[:2]).reshape(-1, 4)


def by_name(found: StoredValues) -> dict[str, tuple[str, ...]]:
    """The nodes that made what each node's result lies in."""
    return {
        node.name: tuple(value.node.name for value in values) for node, values in found.of.items()
    }


def test_views_share_the_memory_of_what_they_view() -> None:
    graph = insert_quantizers(trace(Views(), torch.randn(3, 6)), REFERENCE.rules)
    found = find_stored_values(graph)
    made = by_name(found)
    assert made["x"] == ("x",)
    assert made["quantizers_activation_0"] == ("quantizers_activation_0",)
    for view in ("reshape", "transpose", "split_with_sizes", "getitem", "getitem_1"):
        assert made[view] == ("linear",), view
    (hidden,) = (value for value in found.made if value.node.name == "linear")
    assert (hidden.values, hidden.width, hidden.bytes) == (6, 4, 24)
    # The views read nothing themselves.
    assert [reader.name for reader in hidden.readers] == ["mul_1"]
    # What is the same in every call is no value; what lies in no view's order is copied.
    assert "tanh" not in made
    assert made["slice_1"] == ("mul",)
    assert made["reshape_1"] == ("reshape_1",)
    (codes,) = (value for value in found.made if value.node.op == "call_module")
    assert codes.copied is not None
    assert codes.copied.node.name == "x"


def test_sizes_are_of_one_sample_whatever_the_batch(
    conv_net: nn.Module, conv_graph: fx.GraphModule
) -> None:
    other = trace(conv_net, torch.zeros(1, 3, 16, 16))
    sizes = []
    for graph in (conv_graph, other):
        found = find_stored_values(insert_quantizers(graph, ONNXRUNTIME.rules))
        sizes.append([(value.node.name, value.values) for value in found.made])
    assert sizes[0] == sizes[1]
    assert dict(sizes[0])["x"] == 3 * 16 * 16


def test_what_all_samples_share_is_not_divided(bert_graph: fx.GraphModule) -> None:
    found = find_stored_values(insert_quantizers(bert_graph, ONNXRUNTIME.rules))
    tokens = next(value for value in found.made if value.node.name == "input_ids")
    assert (tokens.values, tokens.width) == (8, 8)
    shared = [value for value in found.made if value.node.meta["example_shape"][:1] != (2,)]
    assert {"embedding_2", "gather"} <= {value.node.name for value in shared}
    for value in found.made:
        recorded = value.node.meta["example_shape"].numel()
        assert value.values == (recorded if value in shared else recorded // 2)


def test_a_fixed_batch_is_followed_from_the_inputs() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
            # The export fixes a batch that is compared with a number.
            hidden = self.fc(x).reshape(2, 5)
            return hidden.sum(0) if len(x) > 7 else hidden, shift * 2

    graph = insert_quantizers(trace(Fixed(), (torch.ones(2, 4), torch.ones(3))), REFERENCE.rules)
    sizes = {value.node.name: value.values for value in find_stored_values(graph).made}
    assert (sizes["x"], sizes["linear"]) == (4, 5)
    assert (sizes["shift"], sizes["mul"]) == (3, 3)


def test_a_question_for_a_size_reads_no_values() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc(x)
            return torch.relu(hidden + 1).reshape(hidden.shape[0], 2, 2)

    found = find_stored_values(
        insert_quantizers(trace(Sized(), torch.randn(2, 4)), REFERENCE.rules)
    )
    (hidden,) = (value for value in found.made if value.node.name == "linear")
    assert [reader.name for reader in hidden.readers] == ["add"]


def test_it_finds_the_same_once_precisions_are_chosen(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: object, uniform: object
) -> None:
    graph = calibrated(conv_graph, images, "onnxruntime")
    planned = uniform(graph)
    assert by_name(find_stored_values(planned)) == by_name(find_stored_values(graph))
