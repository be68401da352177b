from __future__ import annotations

import onnx_ir as ir

from fxmpq.targets.onnxruntime.integer_constants import integer_constant


def test_the_same_integers_are_stored_once() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    one, same, other = (integer_constant(model, values) for values in ([0, 2], (0, 2), [2, 0]))
    assert one is same
    assert one is not other
    assert len(model.graph.initializers) == 2
    assert one.const_value is not None
    assert one.const_value.numpy().tolist() == [0, 2]
    assert one.dtype == ir.DataType.INT64
