from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import lightning
import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import BatchError, TraceError
from fxmpq.graph.batches import flat_inputs
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import fingerprint, trace

Randomize = Callable[..., nn.Module]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def operators(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def test_convolutions_absorb_their_norms(
    conv_net: nn.Module, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    assert not any("batch_norm" in name or "dropout" in name for name in operators(conv_graph))
    for batch in images:
        assert torch.allclose(conv_graph(batch), conv_net(batch), atol=1e-5)


def test_transformers_resnet_keeps_its_output_class(
    resnet: nn.Module, resnet_graph: fx.GraphModule, resnet_batches: list[dict[str, Tensor]]
) -> None:
    found, expected = resnet_graph(**resnet_batches[1]), resnet(**resnet_batches[1])
    assert type(found) is type(expected)
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)


def test_bert_takes_other_lengths_and_batch_sizes(
    bert: nn.Module, bert_graph: fx.GraphModule
) -> None:
    for shape in ((1, 3), (2, 12), (5, 7)):
        ids = torch.randint(1, 40, shape)
        mask = torch.ones_like(ids)
        mask[0, shape[1] // 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        assert torch.allclose(bert_graph(**batch).logits, bert(**batch).logits, atol=1e-5)


def test_the_attention_mask_matters(bert_graph: fx.GraphModule) -> None:
    ids = torch.arange(1, 9).reshape(1, 8)
    whole, half = torch.ones_like(ids), torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    logits = [bert_graph(input_ids=ids, attention_mask=mask).logits for mask in (whole, half)]
    assert not torch.allclose(*logits, atol=1e-3)


def test_flags_that_transformers_takes_as_kwargs(
    bert: nn.Module, token_batches: list[dict[str, Tensor]]
) -> None:
    graph = trace(bert, {**token_batches[0], "output_hidden_states": True})
    assert state_of(graph).dynamic
    batch = {**token_batches[1], "output_hidden_states": True}
    found, expected = graph(**batch), bert(**batch)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


class Several(nn.Module):
    """Takes two tensors and a number, returns a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, object]:
        z = self.fc(x) * scale
        return {"sum": z + y, "parts": (z, [y])}


def test_tuples_are_positional_arguments() -> None:
    model = Several()
    graph = trace(model, (torch.ones(4, 4), torch.ones(4, 3), 2.0))
    call = (torch.randn(7, 4), torch.randn(7, 3), 2.0)
    found, expected = graph(*call), model(*call)
    assert torch.allclose(found["sum"], expected["sum"])
    assert torch.allclose(found["parts"][0], expected["parts"][0])
    assert found["parts"][1][0].equal(call[1])
    assert len(run_batch(graph, call)) == 3


class Answer(NamedTuple):
    logits: Tensor
    features: Tensor


def test_named_tuples_come_back() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Answer:
            return Answer(logits=x * 2, features=x)

    found = trace(Named(), torch.ones(2, 3))(torch.ones(5, 3))
    assert isinstance(found, Answer)
    assert found.logits.shape == (5, 3)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_the_batch_stays_free_whatever_was_traced(
    conv_net: nn.Module, images: list[Tensor], samples: int
) -> None:
    graph = trace(conv_net, images[0][:samples])
    state = state_of(graph)
    assert state.dynamic
    assert [leaf.shape[0] for leaf in state.example if isinstance(leaf, Tensor)] == [2]
    for size in (1, 3, 6):
        batch = images[1][:size]
        assert torch.allclose(graph(batch), conv_net(batch), atol=1e-5)


def test_a_model_with_a_fixed_batch_says_so() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(2.0)[:, None]

    graph = trace(Fixed(), torch.ones(2, 3))
    assert not state_of(graph).dynamic
    with pytest.raises(BatchError, match=r"must have shape \[2, 3\]"):
        flat_inputs(graph, torch.ones(5, 3))


def test_the_model_is_left_as_it_was(randomize: Randomize, images: list[Tensor]) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    graph = trace(model, images[0])
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    # The graph has weights of its own.
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.zero_()
    assert torch.equal(model[0].weight, before["0.weight"])


def test_the_training_flags_survive_an_error() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = Branches().train()
    with pytest.raises(TraceError, match="torch.export cannot take Branches"):
        trace(model, torch.ones(2, 2))
    assert model.training


def test_the_graph_takes_train_and_eval(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    expected = conv_graph(images[0])
    assert conv_graph.train()(images[0]).equal(expected)
    assert conv_graph.eval()(images[0]).equal(expected)


def test_a_lightning_module(images: list[Tensor], randomize: Randomize) -> None:
    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).mean((2, 3))

    model = Lit()
    randomize(model).train()
    graph = trace(model, images[0])
    assert model.training
    expected = model.eval()(images[1])
    assert torch.allclose(graph(images[1]), expected, atol=1e-5)


def test_batches_made_in_inference_mode_work(conv_net: nn.Module, images: list[Tensor]) -> None:
    with torch.inference_mode():
        batch = images[0] * 1
        graph = trace(conv_net, batch)
    assert torch.allclose(graph(images[1]), conv_net(images[1]), atol=1e-5)
    assert not any(parameter.is_inference() for parameter in graph.parameters())


class Mutates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = x + 1
        x.add_(3)
        return x * y


def test_writing_to_the_input_touches_only_the_graphs_values() -> None:
    graph = trace(Mutates(), torch.ones(2, 3))
    x = torch.randn(4, 3)
    kept = x.clone()
    found = graph(x)
    assert torch.equal(x, kept)
    assert torch.allclose(found, Mutates()(kept.clone()))


def test_tied_weights_stay_one_tensor(tied_head: nn.Module) -> None:
    graph = trace(tied_head, torch.ones(2, 3, dtype=torch.long))
    assert sorted(dict(graph.named_parameters())) == ["head.bias", "table.weight"]
    ids = torch.randint(0, 9, (3, 5))
    assert torch.allclose(graph(ids), tied_head(ids))


@pytest.mark.parametrize("batch", ["text", 5, None])
def test_a_batch_of_an_unknown_kind_is_an_error(conv_net: nn.Module, batch: object) -> None:
    with pytest.raises(BatchError, match="a batch is a tensor, a tuple"):
        trace(conv_net, batch)


@pytest.mark.parametrize("batch", [torch.ones(2, 5, 16, 16), {"pixels": torch.ones(2, 3, 16, 16)}])
def test_a_batch_that_the_model_cannot_run_is_an_error(conv_net: nn.Module, batch: object) -> None:
    with pytest.raises(BatchError, match="ConvNet cannot run this batch"):
        trace(conv_net, batch)


def small(stride: int = 1, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride, padding=1), nn.ReLU())


def test_fingerprints_tell_weights_operators_and_arguments_apart() -> None:
    x = torch.ones(2, 3, 8, 8)
    first = state_of(trace(small(), x)).fingerprint
    assert len(first) == 32
    assert state_of(trace(small(), torch.zeros(5, 3, 8, 8))).fingerprint == first
    assert state_of(trace(small(seed=1), x)).fingerprint != first
    assert state_of(trace(small(stride=2), x)).fingerprint != first
    other = nn.Sequential(small()[0], nn.GELU())
    assert state_of(trace(other, x)).fingerprint != first


def test_fingerprints_see_a_single_bit() -> None:
    graph = trace(small(), torch.ones(2, 3, 8, 8))
    before = fingerprint(graph)
    graph.get_parameter("0.bias").data[0] += 1e-6
    assert fingerprint(graph) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_traced_and_hashed(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    graph = trace(model, torch.ones(2, 3, 8, 8, dtype=dtype))
    x = torch.randn(3, 3, 8, 8, dtype=dtype)
    assert torch.equal(graph(x), model(x))
    assert fingerprint(graph) == state_of(graph).fingerprint


def test_a_graph_is_not_traced_again(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    for model in (conv_graph, nn.Sequential(conv_graph)):
        with pytest.raises(TraceError, match="holds a graph from fxmpq.trace"):
            trace(model, images[0])
