"""A model loaded in ONNX Runtime, with the graph that it executes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor


class OnnxModel:
    """An ONNX model loaded in ONNX Runtime.

    Args:
        model: The serialized model.
        threads: Threads inside an operator; 0 leaves it to the runtime.
        optimized: Whether the runtime fuses operators, as it does; else it runs each as written.
    """

    def __init__(self, model: bytes, threads: int = 0, *, optimized: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if not optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        handle, name = tempfile.mkstemp(suffix=".onnx")
        os.close(handle)
        written = Path(name)
        options.optimized_model_filepath = name
        try:
            self.session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            self.executed = onnx.load(written, load_external_data=False)
        finally:
            written.unlink()

    def __call__(self, inputs: Sequence[object]) -> list[Tensor]:
        """Run on flat tensor inputs and return the flat outputs."""
        names = [entry.name for entry in self.session.get_inputs()]
        tensors = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
        feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        found = self.session.run(None, feed)
        return [torch.from_numpy(np.asarray(value)) for value in found]
