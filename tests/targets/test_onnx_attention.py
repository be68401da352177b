from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.lowering import lower
from fxmpq.targets.onnx_export import export_onnx
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]
Run = Callable[..., Tensor]

INFINITE = float("-inf")
LEAST = torch.finfo(torch.float32).min
QUERIES, KEYS = 3, 4


class Attention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, **self.options)


class Safe(nn.Module):
    def __init__(self, *arguments: object) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._safe_softmax(x, *self.arguments)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(*heads: int, samples: int = 2, shared: int | None = None) -> tuple[Tensor, ...]:
    """Query, key and value, of other widths and lengths."""
    before = (samples, *heads)
    others = (samples, shared) if shared else before
    shapes = ((*before, QUERIES, 8), (*others, KEYS, 8), (*others, KEYS, 5))
    return tuple(draw(*shape, seed=seed) for seed, shape in enumerate(shapes))


def exported(model: nn.Module, *example: Tensor) -> ir.Model:
    return export_onnx(lower(trace(model, example)), {}, 21)


def loaded(model: ir.Model) -> Run:
    """Runs a model as it is written and as the runtime fuses it, which agree."""
    serialized = ir.to_proto(model).SerializeToString()
    sessions = []
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        sessions.append(
            onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        )

    def run(*tensors: Tensor) -> Tensor:
        results = []
        for session in sessions:
            names = [entry.name for entry in session.get_inputs()]
            feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
            results.append(torch.from_numpy(session.run(None, feed)[0]))
        torch.testing.assert_close(*results, equal_nan=True, rtol=1e-5, atol=1e-6)
        return results[0]

    return run


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=2e-6)


def booleans(*shape: int) -> st.SearchStrategy[Tensor]:
    return arrays.arrays(np.bool_, shape).map(torch.from_numpy)


def numbers(*shape: int) -> st.SearchStrategy[Tensor]:
    """Mostly minus infinity, so that rows have nothing else."""
    values = st.sampled_from([INFINITE, INFINITE, INFINITE, 0.0, -1.5, 3.0, LEAST, math.nan])
    return arrays.arrays(np.float32, shape, elements=values).map(torch.from_numpy)


@pytest.fixture(scope="module", params=[1, 3], ids=["1 head", "3 heads"])
def heads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def with_booleans(heads: int) -> Run:
    mask = torch.ones(2, 1, QUERIES, KEYS, dtype=torch.bool)
    return loaded(exported(Attention(), *operands(heads), mask))


@pytest.fixture(scope="module")
def with_numbers(heads: int) -> Run:
    return loaded(exported(Attention(), *operands(heads), torch.zeros(2, heads, QUERIES, KEYS)))


@given(mask=st.integers(1, 4).flatmap(lambda samples: booleans(samples, 1, QUERIES, KEYS)))
def test_masks_of_booleans_do_what_they_do_in_torch(
    heads: int, with_booleans: Run, mask: Tensor
) -> None:
    tensors = operands(heads, samples=len(mask))
    found = with_booleans(*tensors, mask)
    check(found, scaled_dot_product_attention(*tensors, mask))
    is_empty = ~mask.any(-1).expand(-1, heads, -1)
    assert not found[is_empty].any()


@given(st.data())
def test_masks_of_numbers_do_what_they_do_in_torch(
    heads: int, with_numbers: Run, data: st.DataObject
) -> None:
    samples = data.draw(st.integers(1, 3))
    mask = data.draw(numbers(samples, heads, QUERIES, KEYS))
    tensors = operands(heads, samples=samples)
    found = with_numbers(*tensors, mask)
    check(found, scaled_dot_product_attention(*tensors, mask))
    assert not found[(mask == INFINITE).all(-1)].any()


@pytest.mark.parametrize("place", range(3))
def test_a_nan_stays_one_in_rows_that_are_empty_too(
    with_booleans: Run, heads: int, place: int
) -> None:
    tensors = operands(heads)
    mask = torch.ones(2, 1, QUERIES, KEYS, dtype=torch.bool)
    mask[0, :, 1] = False
    mask[1, :, :, 2:] = False
    for row in (0, 1, 2):
        spoilt = [tensor.clone() for tensor in tensors]
        spoilt[place][:, :, row] = math.nan
        expected = scaled_dot_product_attention(*spoilt, mask)
        assert bool(expected.isnan().any())
        check(with_booleans(*spoilt, mask), expected)


@pytest.mark.parametrize(
    ("shape", "is_added"),
    [((2, 1, 1, KEYS), True), ((QUERIES, KEYS), False)],
)
def test_masks_are_broadcast(shape: tuple[int, ...], is_added: bool) -> None:
    mask = draw(*shape, seed=7) > 0
    mask[-1] = False
    if is_added:
        mask = torch.zeros(shape).masked_fill(~mask, INFINITE)
    tensors = operands(3)
    found = loaded(exported(Attention(), *tensors, mask))(*tensors, mask)
    check(found, scaled_dot_product_attention(*tensors, mask))
    assert not found[-1, :, -1].any()
    assert bool(found.any())


@pytest.mark.parametrize(
    ("options", "example"),
    [
        ({"is_causal": True, "scale": 0.3}, operands(3)),
        ({"enable_gqa": True}, operands(6, shared=2)),
        ({"enable_gqa": True}, operands(2, shared=2)),
        ({}, operands()),
        ({}, operands(2, 3)),
    ],
)
def test_calls_without_a_mask_test_nothing(
    options: dict[str, object], example: tuple[Tensor, ...]
) -> None:
    model = exported(Attention(**options), *example)
    assert not {"IsNaN", "Where", "ReduceMax", "Equal", "Max"} & set(operators(model))
    more = tuple(torch.cat([tensor, tensor.flip(0)]) for tensor in example)
    run = loaded(model)
    for tensors in (example, more):
        expected = scaled_dot_product_attention(*tensors, **options)  # type: ignore[arg-type]
        check(run(*tensors), expected)


class Twice(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        left = mask.bool()[:, None, None, :]
        for _ in range(2):
            x = scaled_dot_product_attention(x, x, x, left)
        return x


def test_a_mask_of_several_layers_is_tested_once_and_scores_never() -> None:
    x, mask = draw(2, 3, 4, 8, seed=0), torch.tensor([[0, 0, 0, 0], [1, 0, 1, 1]])
    model = exported(Twice(), x, mask)
    found = operators(model)
    assert found.count("Softmax") == 2
    assert [found.count(name) for name in ("ReduceMax", "Equal", "Max", "IsNaN")] == [1, 1, 1, 0]
    # None of them is as large as the scores, which have an axis of heads.
    tested = [node for node in model.graph if node.op_type in ("Where", "ReduceMax", "Max")]
    shapes = [node.outputs[0].shape for node in tested]
    assert all(shape is None or shape[1] == 1 for shape in shapes)
    run = loaded(model)
    for samples in (2, 6):
        tensors = x.repeat(samples // 2, 1, 1, 1), mask.repeat(samples // 2, 1)
        check(run(*tensors), Twice()(*tensors))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.fc(x).unflatten(-1, (2, 4)).transpose(1, 2)
        found = scaled_dot_product_attention(heads, heads, heads, mask.bool()[:, None, None, :])
        return found.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_samples_that_are_masked_whole_are_zero_as_in_the_simulation(
    target: str, calibrated: Made, uniform: Made
) -> None:
    torch.manual_seed(0)
    batch = {"x": draw(3, 5, 8, seed=0), "mask": torch.tensor([[1, 1, 0, 1, 0], [0] * 5, [1] * 5])}
    planned = uniform(calibrated(trace(Layer().eval(), batch), [batch], target))
    made = convert(planned)
    (found,), (expected,) = made.run(batch), run_batch(planned, batch)
    assert isinstance(expected, Tensor)
    assert agreement_db([expected], [found]) > 80
    assert not found[1].any()
    assert bool(found[0].any())
    (row,) = [row for row in made.layers if row.kernel == "float"]
    assert row.reason == "fused attention is computed in float"


@pytest.fixture(scope="module", params=[1, -1], ids=["axis 1", "last axis"])
def axis(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def safe(axis: int) -> Run:
    return loaded(exported(Safe(axis), torch.zeros(2, 3, 4)))


@given(numbers(2, 3, 4))
def test_safe_softmax_is_torchs(axis: int, safe: Run, x: Tensor) -> None:
    found = safe(x)
    check(found, torch.ops.aten._safe_softmax(x, axis))
    is_empty = (x == INFINITE).all(axis, keepdim=True).expand_as(x)
    assert not found[is_empty].any()


def test_safe_softmax_computes_in_the_type_that_is_asked() -> None:
    x = torch.tensor([[1.0, 2.0], [INFINITE, INFINITE]])
    found = loaded(exported(Safe(-1, torch.float64), x))(x)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, torch.ops.aten._safe_softmax(x, -1, torch.float64))
