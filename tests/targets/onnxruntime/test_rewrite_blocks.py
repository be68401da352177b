from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fxmpq.errors import PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.steps import cost
from fxmpq.targets.convert import convert
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.onnxruntime.blocks import unpack_rows
from fxmpq.targets.onnxruntime.rewrite import to_integer_operators
from fxmpq.targets.target import Converted, agreement_db

Made = Callable[..., fx.GraphModule]


class Wide(nn.Module):
    """A table whose weight the head shares, and layers with and without bias, one called twice."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, width), nn.Linear(width, 40, bias=False)
        self.head.weight = self.table.weight
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return self.head(x)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(0))


def planned(
    calibrated: Made, uniform: Made, ids: Tensor, precision: str, width: int = 64, hidden: int = 96
) -> fx.GraphModule:
    torch.manual_seed(0)
    graph = trace(Wide(width, hidden), ids)
    return uniform(calibrated(graph, [ids], "onnxruntime", candidates=[Precision.parse(precision)]))


def stored_bytes(made: Converted) -> int:
    (file,) = made.files
    return sum(len(entry.raw_data) for entry in onnx.load(file).graph.initializer)


@pytest.mark.parametrize(
    "precision", ["w2", "w4", "w8", "w2b32", "w4b16", "w4b32", "w4b128", "w8b256"]
)
def test_block_operators_compute_what_the_simulation_does(
    calibrated: Made, uniform: Made, ids: Tensor, precision: str
) -> None:
    graph = planned(calibrated, uniform, ids, precision)
    rewritten = to_integer_operators(graph, ONNXRUNTIME.rules)
    assert not any(node.op == "call_module" for node in rewritten.graph.nodes)
    names = [str(node.target) for node in rewritten.graph.nodes]
    assert names.count("fxmpq.block_linear.default") == 5
    assert names.count("fxmpq.block_embedding.default") == 1
    (expected,), (found,) = run_batch(graph, ids), run_batch(rewritten, ids)
    assert agreement_db([expected], [found]) > 110


@pytest.mark.parametrize("precision", ["w2", "w4b32"])
def test_the_file_is_as_large_as_predicted_and_runs_on_the_kernels(
    calibrated: Made, uniform: Made, ids: Tensor, precision: str, tmp_path: Path
) -> None:
    graph = planned(calibrated, uniform, ids, precision, width=128, hidden=768)
    made = convert(graph, output=tmp_path, verify=[ids])
    assert made.sqnr_db > 100
    kernels = {row.layer: (row.kernel, row.reason) for row in made.layers}
    assert kernels["up"] == kernels["down#2"] == ("MatMulNBits", "")
    assert kernels["table"][0] == "GatherBlockQuantized"
    assert kernels["table#2"][0] == "MatMulNBits"
    costs = cost(graph)
    predicted = costs.total("weights", costs.uniform(precision))
    # Each call has a corrected bias; besides, a few integers say how weights are laid out.
    biases = 4 * (2 * 768 + 2 * 128 + 40)
    assert 0 <= stored_bytes(made) - predicted - biases < 200
    for shape in ((1, 1), (3, 9)):
        other = torch.randint(0, 40, shape)
        (found,), (expected,) = made.run(other), run_batch(graph, other)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "width", "hidden"), [("w4", 20, 7), ("w2b32", 40, 72), ("w8b32", 33, 48)]
)
def test_rows_that_fill_no_whole_block(
    calibrated: Made, uniform: Made, ids: Tensor, precision: str, width: int, hidden: int
) -> None:
    graph = planned(calibrated, uniform, ids, precision, width, hidden)
    assert convert(graph, verify=[ids]).sqnr_db > 100


def test_a_shared_weight_is_stored_once_beside_integer_layers_too(
    calibrated: Made, uniform: Made, ids: Tensor, tmp_path: Path
) -> None:
    graph = planned(calibrated, uniform, ids, "w4a8", width=128)
    made = convert(graph, output=tmp_path, verify=[ids])
    rows = {row.layer: row.kernel for row in made.layers}
    assert rows["up"] == "MatMulIntegerToFloat"
    assert (
        stored_bytes(made) < 1.1 * cost(graph).total("weights", cost(graph).uniform("w4a8")) + 4000
    )


def test_codes_that_were_rounded_better_are_what_is_stored(
    calibrated: Made, uniform: Made, ids: Tensor
) -> None:
    graph = planned(calibrated, uniform, ids, "w4b32")
    (module,) = [
        entry
        for entry in graph.modules()
        if isinstance(entry, WeightQuantizer) and entry.name == "up.weight"
    ]
    (found,) = module.formats
    codes = module.codes(graph.get_parameter("up.weight").detach(), found)
    module.set_codes(found, codes - codes.remainder(2))
    rewritten = to_integer_operators(graph, ONNXRUNTIME.rules)
    packed = rewritten.get_buffer("packed_4bit_up_weight")
    assert torch.equal(unpack_rows(packed, 4, 64), codes - codes.remainder(2))


def test_blocks_with_integer_activations_or_of_other_sizes_are_refused(
    calibrated: Made, ids: Tensor
) -> None:
    torch.manual_seed(0)
    graph = trace(Wide(32, 32), ids)
    for name in ("w4b32a8", "w4b48", "w3b32", "w4t"):
        with pytest.raises(PrecisionError, match="onnxruntime"):
            calibrated(graph, [ids], "onnxruntime", candidates=[Precision.parse(name)])


def test_a_decoder_mixes_blocks_integers_and_float(calibrated: Made) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    batch = {"input_ids": torch.randint(0, 48, (3, 8))}
    names = ["w8a8", "w4a8", "w8", "w2b32", "w4b16", "fp32"]
    graph = calibrated(
        trace(LlamaForCausalLM(config).eval(), batch),
        [batch],
        "onnxruntime",
        candidates=[Precision.parse(name) for name in names],
    )
    groups = state_of(graph).groups
    # The table comes first, with the head that shares its weight.
    wanted = ["w4b16", "w4a8", "w2b32", "w8", "fp32", "w8a8"]
    choices = {group.name: name for group, name in zip(groups, wanted, strict=False)}
    made = convert(with_choices(graph, choices), verify=[batch])
    assert made.sqnr_db > 60
    kernels = {row.layer: row.kernel for row in made.layers}
    assert kernels["model.embed_tokens"] == "GatherBlockQuantized"
    assert kernels["model.embed_tokens#2"] == "MatMulNBits"
    assert kernels["model.layers.0.self_attn.v_proj"] == "MatMulIntegerToFloat"
    assert kernels["model.layers.0.self_attn.o_proj"] == "MatMulNBits"
    assert "float" in kernels["model.layers.0.mlp.down_proj"]
    (logits,) = made.run({"input_ids": torch.randint(0, 48, (2, 5))})
    assert logits.shape == (2, 5, 48)
