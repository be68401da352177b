"""A model compiled by OpenVINO, with precisions set on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmpq.errors import TargetError

DEVICE = "CPU"


def compile_options(float_type: str) -> dict[str, str]:
    """What a converted model is to be compiled with, wherever it runs.

    Left to itself the runtime computes floats in bfloat16 on CPUs that have it, and rounds the
    inputs of linear layers with weight-only quantization to 8 bits.

    Args:
        float_type: In which the rest is computed, `f32` or `bf16`.

    Raises:
        TargetError: If this CPU has no `bf16`.
    """
    if float_type == "bf16":
        capabilities = ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in capabilities:
            raise TargetError(
                "target 'openvino-bf16' computes in bfloat16, which this CPU does not have (it has "
                f"{', '.join(capabilities)}); prepare for 'openvino'"
            )
    return {"INFERENCE_PRECISION_HINT": float_type, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class OpenvinoModel:
    """A model compiled for the CPU.

    Args:
        model: As it is written to a file.
        options: From `compile_options`.
        threads: Threads inside an operator; they are not bound to cores.
    """

    def __init__(self, model: ov.Model, options: Mapping[str, str], threads: int) -> None:
        self.model = model
        self.compiled = ov.Core().compile_model(
            model,
            DEVICE,
            {**options, "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False},
        )

    def __call__(self, inputs: Sequence[object]) -> list[Tensor]:
        """Run on flat tensor inputs and return the flat outputs."""
        leaves = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        # Kept until the run is over: the runtime reads their memory.
        tensors = [leaf.detach().cpu().contiguous() for leaf in leaves]
        found = self.compiled([_taken(tensor) for tensor in tensors])
        types = [output.get_element_type() for output in self.compiled.outputs]
        return [_returned(found[index], found_type) for index, found_type in enumerate(types)]


def _taken(tensor: Tensor) -> object:
    """A tensor as the runtime takes it; NumPy has no bfloat16."""
    if tensor.dtype is torch.bfloat16:
        return ov.Tensor(tensor.view(torch.int16).numpy(), tensor.shape, ov.Type.bf16)
    return tensor.numpy()


def _returned(array: NDArray[np.generic], found_type: ov.Type) -> Tensor:
    """A copy of what the runtime returned; it shows bfloat16 as other floats of 16 bits."""
    if found_type == ov.Type.bf16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
