from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fxmpq.targets.onnxruntime.blocks import dequantize_rows, pack_rows
from fxmpq.targets.onnxruntime.layout import lay_out_weights

Arrays = dict[str, NDArray[np.generic]]


def laid_out(
    nodes: list[onnx.NodeProto], stored: Arrays, feeds: Arrays, outputs: list[str]
) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in feeds.items()
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "graph", inputs, results, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    lay_out_weights(model)
    return ir.to_proto(model)


def run(model: onnx.ModelProto, feeds: Arrays, folder: Path) -> tuple[list[Tensor], list[str]]:
    """The outputs, and the operators that the runtime executes."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "executed.onnx")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = [torch.from_numpy(value) for value in session.run(None, feeds)]
    executed = onnx.load(options.optimized_model_filepath)
    return found, [node.op_type for node in executed.graph.node]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("width", "block", "scales"),
    [(64, 32, 2), (96, 32, 1), (96, 16, 3), (40, 16, 1), (256, 256, 1)],
)
def test_one_stored_weight_serves_a_linear_layer_and_a_table(
    bits: int, width: int, block: int, scales: int, tmp_path: Path
) -> None:
    rows = 12
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, (rows, width), generator=generator)
    scale = drawn(rows, scales).abs() + 0.1
    packed = pack_rows(codes, bits, block)
    weight = dequantize_rows(packed, scale, bits, block, width)
    blocks = {"bits": bits, "block_size": block, "domain": "com.microsoft"}
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], K=width, N=rows, **blocks
        ),
        helper.make_node("GatherBlockQuantized", ["w", "i", "s"], ["z"], quantize_axis=1, **blocks),
    ]
    x, bias, indices = drawn(2, 3, width), drawn(rows), torch.tensor([[3, 0], [11, 3]])
    stored = {"w": packed.numpy(), "s": scale.numpy(), "b": bias.numpy()}
    feeds = {"x": x.numpy(), "i": indices.numpy()}
    model = laid_out(nodes, stored, feeds, ["y", "z"])
    # What is stored stays as it was: the runtime makes the layouts when it loads the file.
    kept = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    assert all(np.array_equal(kept[name], value) for name, value in stored.items())
    extra = [value.size for name, value in kept.items() if name not in stored]
    assert sum(extra) <= 3 + -(-width // block)
    (linear, table), executed = run(model, feeds, tmp_path)
    assert sorted(executed) == ["GatherBlockQuantized", "MatMulNBits"]
    assert torch.allclose(linear, x @ weight.T + bias, rtol=1e-3, atol=1e-3 * half)
    # Rows are filled up to whole blocks.
    assert torch.allclose(table[..., :width], weight[indices], rtol=1e-5)


def test_integer_products_read_codes_by_input(tmp_path: Path) -> None:
    codes = (drawn(5, 8) * 40).to(torch.int8)
    node = helper.make_node(
        "MatMulIntegerToFloat", ["x", "w", "a", "s"], ["y"], domain="com.microsoft"
    )
    again = helper.make_node(
        "MatMulIntegerToFloat", ["x", "w", "a", "s"], ["z"], domain="com.microsoft"
    )
    x = torch.arange(24, dtype=torch.uint8).reshape(3, 8)
    scale = drawn(5).abs()
    stored = {
        "w": codes.numpy(),
        "a": np.array(0.5, np.float32),
        "s": scale.numpy(),
    }
    model = laid_out([node, again], stored, {"x": x.numpy()}, ["y", "z"])
    assert [node.op_type for node in model.graph.node].count("Transpose") == 1
    found, executed = run(model, {"x": x.numpy()}, tmp_path)
    assert "Transpose" not in executed
    for output in found:
        assert torch.allclose(output, x.float() @ codes.float().T * 0.5 * scale, rtol=1e-4)
