from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import TargetError
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.run import run_batch
from fxmpq.graph.trace import trace
from fxmpq.targets.decomposed import to_decomposed
from fxmpq.targets.inductor import INDUCTOR_BF16
from fxmpq.targets.inductor.bf16 import compute_in_bfloat16
from fxmpq.targets.inductor.compiler import check_bfloat16
from fxmpq.targets.inductor.kernels import Kernels
from fxmpq.targets.inductor.program import InductorProgram
from fxmpq.targets.target import agreement_db

Made = Callable[..., fx.GraphModule]
aten = torch.ops.aten


class Mixed(nn.Module):
    """A convolution on codes, a float layer, products of activations, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.norm = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc(self.conv(x).relu().flatten(2).transpose(1, 2))
        mixed = torch.softmax(rows @ rows.transpose(1, 2), -1) @ rows
        return self.norm(nn.functional.scaled_dot_product_attention(mixed, rows, rows))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixed(calibrated: Made, uniform: Made, inputs: Tensor) -> fx.GraphModule:
    torch.manual_seed(0)
    graph = trace(Mixed(), inputs)
    return uniform(calibrated(graph, [inputs], "inductor", exclude=["fc"]))


def test_float_layers_and_products_read_bfloat16(mixed: fx.GraphModule, inputs: Tensor) -> None:
    graph = to_decomposed(mixed, signed=False)
    found = compute_in_bfloat16(graph)
    graph.recompile()
    assert found == {"linear": "fc.linear", "matmul": "matmul", "matmul_1": "matmul_1"}
    (linear,) = graph.graph.find_nodes(op="call_function", target=aten.linear.default)
    stored = [get_tensor(graph, str(node.target)).dtype for node in linear.args[1:]]
    assert stored == [torch.bfloat16] * 2
    (conv,) = graph.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert get_tensor(graph, str(conv.args[2].target)).dtype is torch.float32
    seen: dict[str, torch.dtype] = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                seen[n.name] = result.dtype
            return result

    (result,) = Look(graph).run(inputs, enable_io_processing=False)
    narrow = {name for name in ("linear", "matmul", "matmul_1") if seen[name] is torch.bfloat16}
    assert narrow == {"linear", "matmul", "matmul_1"}
    assert seen["scaled_dot_product_attention"] is torch.float32
    assert 35 < agreement_db([run_batch(mixed, inputs)[0]], [result]) < 80


class Precise(nn.Module):
    """A layer on codes, and a product of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.fc(x).double()
        return rows @ rows.T


def test_codes_and_products_of_other_types_stay_as_they_are(
    calibrated: Made, uniform: Made
) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    graph = uniform(calibrated(trace(Precise(), x), [x], "inductor"))
    lowered = to_decomposed(graph, signed=False)
    before = [node.name for node in lowered.graph.nodes]
    assert compute_in_bfloat16(lowered) == {}
    assert [node.name for node in lowered.graph.nodes] == before


def test_the_report_and_the_result_are_of_bfloat16(mixed: fx.GraphModule, inputs: Tensor) -> None:
    # Graphs of the two targets are the same; a CPU without bfloat16 computes it slowly.
    made = INDUCTOR_BF16.convert(mixed, None)
    assert made.target == "inductor-bf16"
    assert 35 < agreement_db([run_batch(mixed, inputs)[0]], made.run(inputs)) < 80
    found = {row.layer: row.kernel for row in made.layers}
    assert found == {
        "conv": "onednn.qconv_pointwise relu to float32",
        "fc": "bfloat16",
        "matmul": "bfloat16",
        "matmul_1": "bfloat16",
        "scaled_dot_product_attention": "float",
    }


class Namesakes(nn.Module):
    """Layers on codes that are called as the nodes of another layer and of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.linear, self.matmul = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(self.fc(x).relu()).relu()
        return self.matmul(rows) @ rows.T


def test_layers_on_codes_are_reported_as_such_whatever_their_names(
    calibrated: Made, uniform: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncompiled:
        def __init__(self, program: InductorProgram) -> None:
            self.kernels = Kernels(
                {name: ["int8"] for found in program.marks.values() for name in found}
            )

        def __call__(self, inputs: Sequence[object]) -> list[Tensor]:
            return []

    monkeypatch.setattr("fxmpq.targets.inductor.convert.CompiledGraph", Uncompiled)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    planned = uniform(calibrated(trace(Namesakes(), x), [x], "inductor", exclude=["fc"]))
    rows = INDUCTOR_BF16.convert(planned, None).layers
    assert [(row.layer, row.asked, row.kernel) for row in rows] == [
        ("fc", "fp32", "bfloat16"),
        ("linear", "w8a8", "int8"),
        ("matmul", "w8a8", "int8"),
        ("matmul", "fp32", "bfloat16"),
    ]


def test_a_cpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert INDUCTOR_BF16.check is not None
    with pytest.raises(TargetError, match="neither AVX512-BF16 nor AMX; prepare for 'inductor'"):
        INDUCTOR_BF16.check()


def test_a_cpu_that_torch_tells_nothing_of_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    check_bfloat16()
