from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxmpq.targets.onnxruntime import operators
from fxmpq.targets.onnxruntime.blocks import pack_rows
from fxmpq.targets.onnxruntime.layout import lay_out_weights
from fxmpq.targets.onnxruntime.translate import TRANSLATIONS


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Quantizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.ops.fxmpq.quantize(x, 0.03, 100)
        return codes, torch.ops.fxmpq.dequantize(codes, 0.03, 100)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", (draw(6, 4, seed=1) * 40).to(torch.int8))
        self.register_buffer("scale", draw(6, seed=2).abs() + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ops.fxmpq.dequantize_channels(self.codes, self.scale)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", (draw(4, 6, seed=1) * 40).to(torch.int8))
        self.register_buffer("scale", draw(4, seed=2).abs() + 0.1)
        self.register_buffer("bias", draw(4, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.fxmpq.quantize(x, 0.03, 100)
        return torch.ops.fxmpq.integer_linear(codes, 0.03, 100, self.codes, self.scale, self.bias)


class DynamicLinear(Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.ops.fxmpq.dynamic_quantize(x)
        result = torch.ops.fxmpq.dynamic_linear(*found, self.codes, self.scale, self.bias)
        return result, torch.ops.fxmpq.dynamic_dequantize(*found)


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        codes = torch.ops.fxmpq.quantize(x, 0.03, 100)
        turned = torch.ops.fxmpq.quantize(x.transpose(-1, -2), 0.02, 90)
        return torch.ops.fxmpq.integer_product(codes, 0.03, 100, turned, 0.02, 90)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", (draw(9, 4, seed=1) * 40).to(torch.int8))
        self.register_buffer("scale", draw(9, seed=2).abs() + 0.1)

    def forward(self, indices: Tensor) -> Tensor:
        return torch.ops.fxmpq.integer_embedding(indices, self.codes, self.scale)


class Blocks(nn.Module):
    """Packed weights, their scales, and how they are packed."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        codes = (draw(9, width, seed=1) * 3).clamp(-8, 7).to(torch.int8)
        self.register_buffer("packed", pack_rows(codes, 4, 16))
        self.register_buffer("scale", draw(9, 2, seed=2).abs() + 0.1)
        self.register_buffer("bias", draw(9, seed=3))
        self.layout = (4, 16, width)


class BlockLinear(Blocks):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stored = self.packed, self.scale
        with_bias = torch.ops.fxmpq.block_linear(x, *stored, self.bias, *self.layout, 9)
        return with_bias, torch.ops.fxmpq.block_linear(x, *stored, None, *self.layout, 9)


class BlockEmbedding(Blocks):
    def forward(self, indices: Tensor) -> Tensor:
        return torch.ops.fxmpq.block_embedding(indices, self.packed, self.scale, *self.layout)


class NarrowBlockEmbedding(BlockEmbedding):
    def __init__(self) -> None:
        super().__init__(width=21)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", (draw(6, 4, 3, seed=1) * 40).to(torch.int8))
        self.register_buffer("scale", draw(4, seed=3).abs() + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ops.fxmpq.dequantize_channels(self.codes, self.scale, 1)
        return nn.functional.conv_transpose1d(x, weight, stride=2, groups=2)


class Experts(nn.Module):
    """Two rows for the first expert, none for the second, three for the third, and some left."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", draw(3 * 4, 6, seed=1))
        self.register_buffer("ends", torch.tensor([2, 2, 5], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.fxmpq.grouped_linear(x, self.weight, self.ends, False)


@pytest.mark.parametrize(
    ("model", "example", "expected"),
    [
        (Quantizes, draw(3, 6), {"QuantizeLinear", "DequantizeLinear"}),
        (Weights, draw(3, 6), {"DequantizeLinear", "MatMul"}),
        (Transposed, draw(3, 6, 5), {"DequantizeLinear", "ConvTranspose"}),
        (Experts, draw(5, 6), {"Slice", "MatMul", "Concat"}),
        (Experts, draw(7, 6), {"Slice", "MatMul", "Concat"}),
        (Linear, draw(3, 6), {"QuantizeLinear", "MatMulIntegerToFloat"}),
        (Linear, draw(2, 5, 6), {"QuantizeLinear", "MatMulIntegerToFloat"}),
        (DynamicLinear, draw(2, 5, 6), {"DynamicQuantizeLinear", "MatMulIntegerToFloat"}),
        (Product, draw(2, 5, 6), {"QuantizeLinear", "MatMulIntegerToFloat"}),
        (Embedding, torch.arange(9).reshape(3, 3), {"Gather", "Cast", "Mul"}),
        (BlockLinear, draw(2, 3, 32), {"MatMulNBits"}),
        (BlockEmbedding, torch.arange(9).reshape(3, 3), {"GatherBlockQuantized"}),
        (NarrowBlockEmbedding, torch.arange(9).reshape(3, 3), {"GatherBlockQuantized", "Slice"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_translations_compute_what_the_operators_do(
    model: type[nn.Module], example: Tensor, expected: set[str]
) -> None:
    made = model()
    program = torch.export.export(made, (example,), strict=False)
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=21, custom_translation_table=dict(TRANSLATIONS)
    )
    assert exported is not None
    lay_out_weights(exported.model)
    proto = ir.to_proto(exported.model)
    onnx.checker.check_model(proto)
    assert {node.op_type for node in proto.graph.node} >= expected
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    wanted = made(example)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-5)


def test_every_operator_is_translated() -> None:
    names = (
        "quantize",
        "dequantize",
        "dynamic_quantize",
        "dynamic_dequantize",
        "dequantize_channels",
        "integer_linear",
        "dynamic_linear",
        "integer_product",
        "integer_embedding",
        "block_linear",
        "block_embedding",
    )
    own = {getattr(operators, name)._opoverload for name in names}
    assert set(TRANSLATIONS) == own | {torch.ops.fxmpq.grouped_linear.default}
