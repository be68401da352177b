from __future__ import annotations

from collections.abc import Callable

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13
from torch import Tensor, fx

from fxmpq.errors import TargetError
from fxmpq.targets.convert import convert
from fxmpq.targets.openvino.compiled import OpenvinoModel, compile_options

Made = Callable[..., fx.GraphModule]


class OldCore:
    """OpenVINO on a CPU without bfloat16."""

    def get_property(self, device: str, name: str) -> list[str]:
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return ["FP32", "INT8"]


def test_floats_are_computed_as_asked_and_not_quantized_on_the_way() -> None:
    options = compile_options("f32")
    x = opset13.parameter([-1, 3], np.float32)
    loaded = OpenvinoModel(ov.Model([opset13.relu(x)], [x]), options, 1)
    assert loaded.compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    assert loaded.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert loaded.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert loaded.compiled.get_property("ENABLE_CPU_PINNING") is False


def test_bfloat16_needs_a_cpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ov, "Core", OldCore)
    with pytest.raises(TargetError, match=r"this CPU does not have \(it has FP32, INT8\)"):
        compile_options("bf16")
    assert compile_options("f32")["INFERENCE_PRECISION_HINT"] == "f32"


def test_tensors_of_any_layout_run_and_results_are_kept() -> None:
    x, y = (opset13.parameter([-1, -1], np.float32) for _ in range(2))
    model = ov.Model([opset13.subtract(x, y), opset13.relu(y)], [x, y])
    loaded = OpenvinoModel(model, compile_options("f32"), 1)
    one, other = torch.arange(6.0).reshape(2, 3), torch.ones(3, 2, requires_grad=True).T
    first, second = loaded([one, 2.0, other, None])
    loaded([other, one])
    assert torch.equal(first, one - 1)
    assert torch.equal(second, torch.ones(2, 3))


def test_bfloat16_comes_in_and_out() -> None:
    x = opset13.parameter([-1, 3], ov.Type.bf16)
    twice = opset13.add(x, x)
    mean = opset13.reduce_mean(twice, opset13.constant([0, 1]))
    loaded = OpenvinoModel(ov.Model([twice, mean], [x]), compile_options("f32"), 1)
    given = torch.tensor([[1.5, -2.0, 3.0], [0.25, 1e30, 0.0]], dtype=torch.bfloat16)
    found, found_mean = loaded([given])
    assert torch.equal(found, given + given)
    assert found_mean.dtype is torch.bfloat16
    assert found_mean.shape == ()


def test_the_rest_is_computed_in_bfloat16_where_that_is_asked_and_there(
    calibrated: Made, uniform: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = uniform(calibrated(conv_graph, images, "openvino-bf16", exclude=["fc", "conv2"]), 2)
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(TargetError, match="bfloat16, which this CPU does not have"):
            convert(graph)
        return
    made = convert(graph, verify=images)
    assert 35 < made.sqnr_db < 70
    assert made.target == "openvino-bf16"
    assert isinstance(made.module, OpenvinoModel)
    notes = [
        node.get_rt_info() for node in made.module.compiled.get_runtime_model().get_ordered_ops()
    ]
    kernels = {n["originalLayersNames"].value: n["primitiveType"].value for n in notes}
    (stem,) = [kernel for name, kernel in kernels.items() if name.startswith("stem.0")]
    assert stem.endswith("I8")
    assert any(kernel.endswith("bf16") for kernel in kernels.values())
