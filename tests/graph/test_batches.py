from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import BatchError, CalibrationError, FxmpqError
from fxmpq.graph.batches import (
    batch_size,
    call_arguments,
    example_batch,
    first_sample,
    flat_inputs,
    graph_device,
    materialize,
)
from fxmpq.graph.trace import trace


def tokens(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def test_the_three_kinds_of_batch() -> None:
    x = torch.ones(1)
    assert call_arguments(x) == ((x,), {})
    assert call_arguments((x, 2)) == ((x, 2), {})
    assert call_arguments([x]) == ((x,), {})
    assert call_arguments({"x": x}) == ((), {"x": x})
    assert call_arguments(OrderedDict(x=x)) == ((), {"x": x})


@pytest.mark.parametrize("batch", ["text", 3, None, {1, 2}])
def test_another_kind_of_batch_is_an_error(batch: object) -> None:
    with pytest.raises(BatchError, match=f"found {type(batch).__name__}"):
        call_arguments(batch)


def test_the_sample_count_is_the_first_dimension_of_the_first_tensor() -> None:
    assert batch_size([3, torch.tensor(1.0), torch.ones(5, 2), torch.ones(7)]) == 5
    assert batch_size([3]) == 1


def test_batches_become_a_list() -> None:
    assert len(materialize(torch.ones(1) for _ in range(3))) == 3


@pytest.mark.parametrize("empty", [[], (), iter([])])
def test_no_batches_is_an_error(empty: object) -> None:
    with pytest.raises(CalibrationError, match="calibration data is empty; pass at least one"):
        materialize(empty)


@pytest.mark.parametrize("single", [torch.ones(2, 3), {"x": torch.ones(2)}])
def test_one_batch_instead_of_many_is_an_error(single: object) -> None:
    with pytest.raises(BatchError, match=r"Wrap it in a list: \[batch\]"):
        materialize(single, "measuring")


def test_a_graph_without_tensors_is_on_the_cpu() -> None:
    assert graph_device(fx.symbolic_trace(nn.ReLU())) == torch.device("cpu")


def test_no_tensor_but_the_first_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at all takes longer than a small model's run, and it is asked at every call."""

    def parameters() -> Iterator[Tensor]:
        yield torch.ones(1, device="meta")
        raise AssertionError

    graph = fx.symbolic_trace(nn.Linear(2, 2))
    monkeypatch.setattr(graph, "parameters", parameters)
    assert graph_device(graph) == torch.device("meta")


def test_a_module_that_was_not_traced_is_an_error() -> None:
    with pytest.raises(FxmpqError, match=r"call fxmpq.trace\(model, batch\) first"):
        flat_inputs(fx.symbolic_trace(nn.ReLU()), torch.ones(1))


def test_tensors_of_inference_mode_come_as_ones_that_autograd_takes(
    conv_graph: fx.GraphModule,
) -> None:
    with torch.inference_mode():
        batch = torch.ones(2, 3, 16, 16)
        assert flat_inputs(conv_graph, batch)[0] is batch
    [found] = flat_inputs(conv_graph, batch)
    assert isinstance(found, Tensor)
    assert not found.is_inference()
    assert torch.equal(found, batch)


def test_keyword_arguments_come_in_any_order(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    batch = token_batches[1]
    reordered = dict(reversed(batch.items()))
    for flat in (flat_inputs(bert_graph, batch), flat_inputs(bert_graph, reordered)):
        assert flat[0] is batch["input_ids"]
        assert flat[1] is batch["attention_mask"]


def test_free_sizes_take_any_batch(conv_graph: fx.GraphModule, bert_graph: fx.GraphModule) -> None:
    for samples in (1, 2, 9):
        assert len(flat_inputs(conv_graph, torch.ones(samples, 3, 16, 16))) == 1
    for shape in ((1, 3), (7, 12)):
        flat_inputs(bert_graph, {"input_ids": tokens(*shape), "attention_mask": tokens(*shape)})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.ones(2, 3, 16), r"must have shape \[any, 3, 16, 16\]"),
        (torch.ones(2, 1, 16, 16), r"must have shape \[any, 3, 16, 16\] .* found \[2, 1, 16, 16\]"),
        (torch.ones(2, 3, 16, 17), r"found \[2, 3, 16, 17\]"),
        (torch.ones(2, 3, 16, 16).double(), "dtype torch.float32; found .* torch.float64"),
        (torch.ones(2, 3, 16, 16).byte(), "found .* torch.uint8"),
        ((torch.ones(2, 3, 16, 16), 1), "was traced with the call"),
        ((1.0,), "must be a tensor; found float"),
        ({"x": torch.ones(2, 3, 16, 16)}, "has an argument 'x'"),
    ],
)
def test_images_that_do_not_fit(conv_graph: fx.GraphModule, batch: object, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        flat_inputs(conv_graph, batch)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": tokens(2, 8)}, "lacks attention_mask, with which the model was traced"),
        (
            {"input_ids": tokens(2, 8), "attention_maks": tokens(2, 8)},
            "has an argument 'attention_maks'.*closest: 'attention_mask'",
        ),
        (
            {"input_ids": tokens(2, 8), "attention_mask": tokens(2, 7)},
            r"'attention_mask' must have shape \[2, 8\].* found \[2, 7\]",
        ),
        (
            {"input_ids": tokens(2, 8), "attention_mask": tokens(3, 8)},
            r"'attention_mask' must have shape \[2, 8\].* found \[3, 8\]",
        ),
        (
            {"input_ids": tokens(2, 13), "attention_mask": tokens(2, 13)},
            r"'input_ids' must have shape \[any, at most 12\]",
        ),
        ({"input_ids": tokens(8), "attention_mask": tokens(8)}, r"found \[8\]"),
        ((tokens(2, 8), tokens(2, 8)), "lacks input_ids, attention_mask"),
    ],
)
def test_tokens_that_do_not_fit(bert_graph: fx.GraphModule, batch: object, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        flat_inputs(bert_graph, batch)


class Scaled(nn.Module):
    def forward(self, x: Tensor, factor: float = 1.0, mask: Tensor | None = None) -> Tensor:
        y = x * factor
        return y if mask is None else y * mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 3.0}, "'factor' must be 2.0, with which the model was traced; found 3.0"),
        ({"factor": 2}, "'factor' must be 2.0"),
        ({"mask": torch.ones(2, 3)}, "'mask' must be None.* found a tensor"),
    ],
)
def test_constants_that_the_graph_does_not_hold(change: dict[str, object], message: str) -> None:
    call = {"x": torch.ones(2, 3), "factor": 2.0, "mask": None}
    graph = trace(Scaled(), call)
    assert len(flat_inputs(graph, call)) == 3
    with pytest.raises(BatchError, match=message):
        flat_inputs(graph, {**call, **change})


def test_the_example_is_called_as_the_model_was_traced() -> None:
    x, scaled = torch.arange(12.0).reshape(4, 3), {"x": torch.ones(3, 2), "factor": 2.0}
    (kept,) = example_batch(trace(nn.Linear(3, 3), x))
    assert torch.equal(kept, x[:2])
    found = example_batch(trace(Scaled(), scaled))
    assert isinstance(found, dict)
    assert torch.equal(found["x"], scaled["x"][:2])
    assert found["factor"] == 2.0


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


def test_one_sample_is_taken_where_the_batch_size_is_free(bert_graph: fx.GraphModule) -> None:
    x = torch.arange(15.0).reshape(5, 3)
    for batch in (x, (x,)):
        (found,) = first_sample(trace(nn.Linear(3, 3), x), batch)
        assert torch.equal(found, x[:1])
    ids = UserDict(input_ids=tokens(4, 8), attention_mask=tokens(4, 8))
    assert {name: tuple(found.shape) for name, found in first_sample(bert_graph, ids).items()} == {
        "input_ids": (1, 8),
        "attention_mask": (1, 8),
    }
    fixed = torch.ones(2, 3)
    assert first_sample(trace(Fixed(), fixed), fixed) is fixed
