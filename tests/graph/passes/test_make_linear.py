from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from fxmpq.graph.layers import find_layers
from fxmpq.graph.passes.make_linear import make_linear
from fxmpq.graph.trace import trace
from fxmpq.graph.weight_share import weight_share

aten = torch.ops.aten


class Product(nn.Module):
    """`x @ W`, in one of the ways people write it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        shape = (6, 5) if form in ("matmul", "mm", "addmm") else (5, 6)
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        forms = {
            "matmul": lambda: x @ self.weight,
            "mm": lambda: torch.mm(x.flatten(0, 1), self.weight),
            "addmm": lambda: torch.addmm(self.bias, x.flatten(0, 1), self.weight),
            "T": lambda: x @ self.weight.T,
            "t": lambda: x @ self.weight.t(),
            "mT": lambda: x @ self.weight.mT,
            "adjoint": lambda: x @ self.weight.adjoint(),
            "permute": lambda: x @ self.weight.permute(1, 0),
            "transpose": lambda: x @ self.weight.transpose(-1, -2),
        }
        return forms[self.form]()


FORMS = ["matmul", "mm", "addmm", "T", "t", "mT", "adjoint", "permute", "transpose"]


def targets(graph: fx.GraphModule) -> list[object]:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def batch(samples: int = 4) -> Tensor:
    return torch.randn(samples, 3, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", FORMS)
def test_a_product_with_a_stored_weight_becomes_linear_bit_for_bit(form: str) -> None:
    model = Product(form).eval()
    graph = trace(model, batch())
    assert targets(graph).count(aten.linear.default) == 1
    assert not {aten.mm.default, aten.matmul.default, aten.addmm.default} & set(targets(graph))
    for samples in (2, 5):
        assert torch.equal(graph(batch(samples)), model(batch(samples)))


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_keeps_its_name_and_is_out_by_in(form: str) -> None:
    graph = trace(Product(form).eval(), batch())
    assert graph.weight.shape == (5, 6)
    assert isinstance(graph.weight, nn.Parameter)


class Function(nn.Module):
    """A product that a function of the activation and a matrix makes."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


BEHIND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transposed": lambda x, w: w @ x.transpose(1, 2),
    "mT": lambda x, w: w @ x.mT,
    "as it is": lambda x, w: w @ x.reshape(-1, 6, 3),
    "two dimensions": lambda x, w: torch.mm(w, x.flatten(0, 1).T),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_weight_in_front_gives_a_linear_layer_with_its_bits(name: str) -> None:
    model = Function(BEHIND[name]).eval()
    graph = trace(model, batch())
    assert targets(graph).count(torch.ops.fxmpq.linear.default) == 1
    assert not {aten.mm.default, aten.matmul.default} & set(targets(graph))
    assert torch.equal(graph.weight, model.weight)
    for samples in (2, 5):
        assert torch.equal(graph(batch(samples)), model(batch(samples)))


COMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "columns": lambda x, w: x @ w[:, 1:4],
    "rows": lambda x, w: x[..., :4] @ w[2:],
    "chunks": lambda x, w: x @ w.chunk(2, 1)[1],
    "scaled": lambda x, w: x @ (w / w.norm()),
    "low rank": lambda x, w: x @ (w[:, :2] @ w[:2]),
    "slice in front": lambda x, w: w[:3] @ x.mT,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_matrix_that_is_computed_of_stored_ones_is_stored(name: str) -> None:
    model = Function(COMPUTED[name]).eval()
    graph = trace(model, batch())
    [layer] = find_layers(graph).layers
    assert layer.kind == "linear"
    assert find_layers(graph).left_float == ()
    for samples in (2, 5):
        assert torch.equal(graph(batch(samples)), model(batch(samples)))


def test_a_matrix_on_both_sides_is_a_layer_once() -> None:
    model = Function(lambda x, w: (w @ x.mT).mT @ w).eval()
    graph = trace(model, batch())
    assert len(find_layers(graph).layers) == 1
    assert aten.matmul.default in targets(graph)
    assert torch.equal(graph(batch()), model(batch()))


def test_the_model_is_left_alone() -> None:
    model = Product("matmul").eval()
    before = model.weight.detach().clone()
    trace(model, batch())
    assert torch.equal(model.weight, before)


def test_gpt2_is_all_linear_and_equal_to_the_last_bit() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False
    )
    model = GPT2Model(config)
    ids = torch.randint(0, 40, (3, 8), generator=torch.Generator().manual_seed(1))
    graph = trace(model.eval(), {"input_ids": ids})
    assert targets(graph).count(aten.linear.default) == 8
    expected = model(input_ids=ids).last_hidden_state
    assert torch.equal(graph(input_ids=ids).last_hidden_state, expected)


class Tied(nn.Module):
    """The matrix is read as it is and also by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table) @ self.table


def test_a_matrix_with_other_readers_is_not_turned_round() -> None:
    graph = trace(Tied(), torch.tensor([[0, 1], [2, 5]]))
    assert aten.matmul.default in targets(graph)


class Shared(nn.Module):
    """One Conv1D called twice, and once more where its bias does not fit `linear`."""

    def __init__(self, *, odd: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.odd = Conv1D(6, 6), odd

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(torch.relu(self.layer(x)))
        if not self.odd:
            return x
        return torch.addmm(self.layer.bias, x.flatten(0, 1), self.layer.weight, beta=0.5)


def test_a_matrix_of_several_products_is_turned_round_once() -> None:
    model = Shared(odd=False).eval()
    graph = trace(model, batch())
    assert targets(graph).count(aten.linear.default) == 2
    assert torch.equal(graph.layer.weight.t(), model.layer.weight)
    assert torch.equal(graph(batch()), model(batch()))


def test_it_is_not_while_one_reader_wants_it_as_it_is() -> None:
    model = Shared(odd=True).eval()
    graph = trace(model, batch())
    assert aten.linear.default not in targets(graph)
    assert torch.equal(graph(batch()), model(batch()))


class Other(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.ones(6, 5))
        self.stack = nn.Parameter(torch.ones(4, 6, 5))
        self.bias = nn.Parameter(torch.ones(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "stack":
            return x @ self.stack[:1]
        if self.form == "left":
            return self.weight.t() @ x.transpose(1, 2)
        if self.form == "scaled":
            return torch.addmm(self.bias[0], x.flatten(0, 1), self.weight, beta=0.5)
        if self.form == "wide bias":
            return torch.addmm(self.bias, x.flatten(0, 1), self.weight)
        return x @ x.transpose(1, 2)


@pytest.mark.parametrize("form", ["stack", "left", "scaled", "wide bias", "activations"])
def test_other_products_stay(form: str) -> None:
    model = Other(form).eval()
    graph = trace(model, batch())
    assert aten.linear.default not in targets(graph)
    assert torch.equal(graph(batch()), model(batch()))


def test_it_says_how_many_it_replaced() -> None:
    program = torch.export.export(Conv1D(5, 6).eval(), (batch(),), strict=False)
    graph = program.module(check_guards=False)
    assert make_linear(graph) == 1
    assert make_linear(graph) == 0


class LowRank(nn.Module):
    """A matrix that is the product of two, one of them computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ ((self.down * 0.5) @ self.up)


def test_a_product_of_stored_matrices_becomes_one_weight() -> None:
    model = LowRank().eval()
    graph = trace(model, batch())
    assert targets(graph) == [aten.linear.default]
    share = weight_share(graph)
    assert (share.quantizable, share.total) == (30, 30)
    assert torch.equal(graph(batch()), model(batch()))
