from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.graph.state import state_of
from fxmpq.graph.switch import with_choices
from fxmpq.targets.onnx_export import export_onnx
from fxmpq.targets.tensorrt.rewrite import to_symmetric_qdq
from fxmpq.targets.tensorrt.translate import TRANSLATIONS

Made = Callable[..., fx.GraphModule]


def test_every_operator_of_the_form_is_translated() -> None:
    names = {str(overload) for overload in TRANSLATIONS}
    assert names == {"fxmpq.symmetric_codes.default", "fxmpq.symmetric_numbers.default"}


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("w8a8", ir.DataType.INT8), ("we4m3tae4m3", ir.DataType.FLOAT8E4M3FN)],
)
def test_codes_scales_and_zeros_are_stored(
    calibrated: Made,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    precision: str,
    kind: ir.DataType,
) -> None:
    graph = calibrated(
        conv_graph, images, target="tensorrt", candidates=[Precision.parse(precision)]
    )
    graph = with_choices(graph, {group.name: precision for group in state_of(graph).groups})
    model = export_onnx(to_symmetric_qdq(graph), TRANSLATIONS, 21)
    quantize = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(quantize) == 5
    for node in quantize:
        _, scale, zero = node.inputs
        assert scale.is_initializer()
        assert zero.is_initializer()
        assert zero.dtype is kind
        assert not torch.tensor(zero.const_value.numpy().astype(float)).any()
    stored = {n: v for n, v in model.graph.initializers.items() if n.startswith("codes_")}
    assert len(stored) == 5
    assert {value.dtype for value in stored.values()} == {kind}
    assert stored["codes_fc_weight"].shape == [16, 5]
