from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import fx, nn

from fxmpq.errors import TargetError
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.onnxruntime.versions import check_release

Made = Callable[..., fx.GraphModule]


def model_of(operator: str, bits: int, stored: int = TensorProto.UINT8) -> onnx.ModelProto:
    node = helper.make_node(operator, ["x", "w"], ["y"], domain="com.microsoft", bits=bits)
    weight = helper.make_tensor("w", stored, [4], np.zeros(4, np.int8))
    return helper.make_model(helper.make_graph([node], "g", [], [], [weight]))


@pytest.mark.parametrize(
    ("operator", "bits", "stored", "older", "first"),
    [
        ("MatMulNBits", 2, TensorProto.UINT8, "1.23.2", "1.24.0"),
        ("Other", 8, TensorProto.INT2, "1.23.2", "1.24"),
        ("GatherBlockQuantized", 2, TensorProto.UINT8, "1.26.0", "1.27.0"),
    ],
)
def test_two_bits_take_a_newer_release(
    operator: str, bits: int, stored: int, older: str, first: str
) -> None:
    model = model_of(operator, bits, stored)
    with pytest.raises(TargetError, match=rf"2 bits.* from {first[:4]} on, and {older} is"):
        check_release(model, older)
    check_release(model, first)
    check_release(model, "2.0.0")


@pytest.mark.parametrize("operator", ["MatMulNBits", "GatherBlockQuantized"])
def test_other_widths_run_everywhere(operator: str) -> None:
    check_release(model_of(operator, 4, TensorProto.INT4), "1.23.0")


def test_conversion_refuses_what_the_runtime_is_too_old_for(
    calibrated: Made, uniform: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    graph = calibrated(trace(nn.Linear(8, 4), x), [x], "onnxruntime")
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    assert convert(uniform(graph, 1)).layers[0].asked == "w4a8"
    with pytest.raises(TargetError, match="weights of 2 bits, which ONNX Runtime runs from 1.24"):
        convert(uniform(graph, 0))
