"""Lists of integers that operators read as operands, each stored once in a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def integer_constant(model: ir.Model, values: Sequence[int]) -> ir.Value:
    """An initializer with these integers; the same one for the same integers.

    Args:
        model: It gets the initializer, if it has none yet.
        values: As axes or sizes.

    Returns:
        Of type `INT64`, shape `[len(values)]`.
    """
    name = f"integers_{'_'.join(map(str, values))}"
    found = model.graph.initializers.get(name)
    if found is None:
        tensor = ir.tensor(np.array(values, np.int64), name=name)
        found = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([len(values)]),
            const_value=tensor,
        )
        model.graph.initializers[name] = found
    return found
