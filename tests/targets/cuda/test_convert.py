from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]
Check = Callable[[Converted, fx.GraphModule, float], None]


def parsed(*names: str) -> list[Precision]:
    return [Precision.parse(name) for name in names]


@pytest.fixture(scope="module")
def planned_bert(
    calibrated: Made,
    in_turn: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> fx.GraphModule:
    names = ("w8a8", "w4b32", "we4m3ae4m3", "we4m3")
    return in_turn(calibrated(bert_graph, token_batches, "cuda", candidates=parsed(*names)))


@pytest.fixture(scope="module")
def made_bert(planned_bert: fx.GraphModule, token_batches: list[dict[str, Tensor]]) -> Converted:
    return convert(planned_bert, verify=token_batches)


def test_static_integers_agree_to_float_rounding(
    calibrated: Made,
    in_turn: Made,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    check_batch_sizes: Check,
) -> None:
    candidates = parsed("w2a8", "w4a8", "w8a8", "we4m3ae4m3")
    planned = in_turn(calibrated(conv_graph, images, "cuda", candidates=candidates))
    made = convert(planned, verify=images)
    assert made.target == "cuda"
    assert made.sqnr_db > 110
    check_batch_sizes(made, planned, 100)
    assert not any(row.reason for row in made.layers)
    assert [row.kernel for row in made.layers] == [
        "_int_mm on cpu, patches of 3x3",
        "_int_mm on cpu, patches of 3x3",
        "_int_mm on cpu",
        "_int_mm on cpu, patches of 3x3",
        "_scaled_mm on cpu",
    ]


def test_bert_runs_with_masks_and_lengths(
    made_bert: Converted, planned_bert: fx.GraphModule, check_masks_and_lengths: Check
) -> None:
    # Later quantizers amplify what bfloat16 rounds; each layer by itself is looked at below.
    assert made_bert.sqnr_db > 25
    check_masks_and_lengths(made_bert, planned_bert, 25)


def test_each_layers_kernel_is_told(made_bert: Converted) -> None:
    expected = {
        "w8a8": "_int_mm on cpu",
        "we4m3ae4m3": "_scaled_mm on cpu",
        "w4b32": "_weight_int4pack_mm on cpu",
        "we4m3": "float on dequantized fp8_e4m3 weights, float input",
    }
    rows = [row for row in made_bert.layers if "embeddings" not in row.layer]
    layers = [row for row in rows if row.asked != "fp32"]
    assert {row.asked for row in layers} == set(expected)
    assert all(row.kernel == expected[row.asked] for row in layers)
    reasons = {row.asked: row.reason for row in layers if row.reason}
    assert reasons == {"we4m3": "there is no kernel on codes for we4m3"}
    tables = [row for row in made_bert.layers if "embeddings" in row.layer]
    assert all(row.kernel.startswith("look-up of ") for row in tables)
    floats = [row for row in rows if row.asked == "fp32"]
    assert Counter(row.kernel for row in floats) == {"float": 2}


def test_layers_tell_what_they_compute(
    made_bert: Converted, planned_bert: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    found = layer_agreements(planned_bert, made_bert, token_batches[0])
    assert len(found) == sum(row.asked != "fp32" for row in made_bert.layers) + 1
    assert min(entry.sqnr_db for entry in found) > 35
    again = layer_agreements(planned_bert, made_bert, token_batches[0])
    assert found == again


def test_files_are_those_of_the_reference(
    planned_bert: fx.GraphModule, made_bert: Converted, tmp_path: Path
) -> None:
    assert made_bert.files == ()
    made = convert(planned_bert, output=tmp_path / "cuda", verify=False)
    reference = convert_reference(planned_bert, tmp_path / "reference")
    assert [file.name for file in made.files] == ["model.safetensors", "model.json"]
    for one, other in zip(made.files, reference.files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_bfloat16_computes_what_stays_float(
    calibrated: Made,
    in_turn: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    graph = calibrated(
        bert_graph,
        token_batches,
        "cuda-bf16",
        candidates=parsed("w8a8", "we4m3"),
        exclude=["*value"],
    )
    made = convert(in_turn(graph), verify=token_batches)
    assert made.target == "cuda-bf16"
    kernels = {row.layer: (row.asked, row.kernel) for row in made.layers}
    floats = {name: kernel for name, (asked, kernel) in kernels.items() if asked == "fp32"}
    # Two layers that the user keeps, and attention.
    assert Counter(floats.values()) == {"bfloat16": 4}
    dequantized = {kernel for asked, kernel in kernels.values() if asked == "we4m3"}
    assert "bfloat16 on dequantized fp8_e4m3 weights, float input" in dequantized
    assert 35 < made.sqnr_db < 90


def test_the_plan_and_the_model_stay_as_they_are(
    planned_bert: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    before = {name: tensor.clone() for name, tensor in planned_bert.state_dict().items()}
    code = planned_bert.code
    convert(planned_bert, verify=False)
    assert planned_bert.code == code
    after = planned_bert.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


class Tied(nn.Module):
    """A table that shares its weight with a linear layer, which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 30)
        self.head = nn.Linear(30, 30)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.head(self.table(ids)).relu())


@pytest.mark.parametrize("precision", ["w8a8", "we4m3ae4m3", "w4"])
def test_shared_weights(calibrated: Made, uniform: Made, precision: str) -> None:
    torch.manual_seed(0)
    ids = torch.randint(30, (4, 3))
    graph = calibrated(trace(Tied(), ids), [ids], "cuda", candidates=parsed(precision))
    made = convert(uniform(graph))
    assert made.sqnr_db > (35 if precision == "w4" else 100)
    assert isinstance(made.module, fx.GraphModule)
    # The table's codes, and the linear layers' once for both calls.
    matrices = [tensor for tensor in made.module.state_dict().values() if tensor.dim() == 2]
    assert len(matrices) == 2


def test_the_module_is_called_like_the_model_and_traced_as_a_whole(
    calibrated: Made, uniform: Made
) -> None:
    """Without breaks, a compiler can fuse what lies around the products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(4, 2, 5)
    planned = uniform(calibrated(trace(model, x), [x], "cuda", candidates=parsed("w8a8")))
    module = convert(planned).module
    assert isinstance(module, fx.GraphModule)
    traced = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        for batch in (x, x[:2]):
            assert torch.equal(traced(batch), module(batch))
