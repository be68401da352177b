from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from fxmpq.targets.tensorrt import lint

INT8, INT4 = TensorProto.INT8, TensorProto.INT4


def problems(kind: int, codes: list[int], scales: list[int], **attributes: int) -> dict[str, str]:
    """What a single dequantization breaks, as messages by rule."""
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], **attributes)
    tensors = [
        helper.make_tensor(name, entry, shape, [1] * int(np.prod(shape)))
        for name, entry, shape in (("w", kind, codes), ("s", TensorProto.FLOAT, scales))
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, codes)
    graph = helper.make_graph([node], "g", [], [result], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return {found.rule: found.message for found in lint(model)}


@pytest.mark.parametrize(
    ("kind", "codes", "scales", "attributes"),
    [
        (INT8, [4, 6], [], {}),
        (INT8, [4, 6], [1], {}),
        (INT8, [4, 6], [6], {}),
        (INT8, [4, 6], [6], {"axis": -1}),
        (INT8, [4, 6, 3, 3], [4], {"axis": 0}),
        (INT8, [4, 6], [2, 6], {"axis": 0, "block_size": 2}),
        (INT8, [4, 6], [4, 2], {"axis": -1, "block_size": 3}),
        (INT4, [128, 6], [1, 6], {"axis": 0, "block_size": 128}),
        (INT4, [6, 128], [6, 2], {"block_size": 64}),
    ],
)
def test_scales_of_tensors_channels_and_blocks_are_legal(
    kind: int, codes: list[int], scales: list[int], attributes: dict[str, int]
) -> None:
    assert problems(kind, codes, scales, **attributes) == {}


@pytest.mark.parametrize(
    ("codes", "scales", "attributes", "words"),
    [
        ([4, 6], [4], {}, "4 scales along axis 1 of [4, 6]"),
        ([4, 6], [6], {"axis": 3}, "6 scales along axis 3 of [4, 6]"),
        ([6], [6], {}, "6 scales along axis 1 of [6]"),
        ([], [6], {}, "6 scales along axis 1 of []"),
        ([4, 6], [2, 3], {"axis": 0, "block_size": 2}, "scales of [2, 3] for [4, 6]; one of"),
        ([4, 6], [3, 6], {"axis": 0, "block_size": 2}, "scales of [3, 6] for [4, 6]; one of"),
        ([4, 6], [0, 6], {"axis": 0, "block_size": 2}, "scales of [0, 6] for [4, 6]; one of"),
        ([4, 6, 2], [2, 6, 2], {"axis": 0, "block_size": 2}, "; one of the last two axes"),
        ([4, 6], [2, 6], {"axis": 0}, "blocks of 2 along axis 0, but block_size is 0 and axis 0"),
        ([4, 6], [2, 6], {"axis": 0, "block_size": 3}, "but block_size is 3 and axis 0"),
        ([4, 6], [2, 6], {"axis": 1, "block_size": 2}, "but block_size is 2 and axis 1"),
    ],
)
def test_scales_that_fit_no_axis_are_not(
    codes: list[int], scales: list[int], attributes: dict[str, int], words: str
) -> None:
    assert words in problems(INT8, codes, scales, **attributes)["shapes of scales"]


def test_one_scale_of_four_bits_is_no_block() -> None:
    found = problems(INT4, [8, 8], [1, 1], axis=0, block_size=8)
    assert "INT4 weights of [8, 8] with scales of [1, 1]" in found["4 bits in blocks of weights"]
