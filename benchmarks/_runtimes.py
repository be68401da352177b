"""How the benchmarks run what fxmpq and others made, on one thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _peers import Batch, quantized_by
from numpy.typing import NDArray
from torch import Tensor, nn

from fxmpq.targets.target import Converted

Feed = dict[str, NDArray[np.generic]]
Run = Callable[[Batch], object]

DEFAULT = "torch.compile, default"
"""A float contestant that is no route to a quantized model."""


@dataclass(frozen=True)
class Subject:
    """A model to run.

    Args:
        model: In eval mode.
        calibration: Batches for ranges and sensitivities.
        is_transformer: What some libraries want to be told.
    """

    model: nn.Module
    calibration: list[Batch]
    is_transformer: bool = False


@dataclass(frozen=True)
class Runtime:
    """What runs models, and how its own quantization is called.

    Args:
        run: From what fxmpq converted to what is timed.
        own: Makes models by the routes of the runtime's own people, by name, given the subject,
            the float model as fxmpq converted it, and a folder to write to.
        kernels: Lists what is executed for a converted model, where that is told apart.
    """

    run: Callable[[Converted], Run]
    own: Callable[[Subject, Converted, Path], Mapping[str, Run]]
    kernels: Callable[[Converted], str]


def feed_of(batch: Batch, names: list[str]) -> Feed:
    """A batch as arrays, of the inputs that a file has."""
    return {name: batch[name].numpy() for name in names}


def onnx_run(file: Path, optimized: Path | None = None) -> Run:
    """Load a file in ONNX Runtime; optionally write the graph that is executed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return lambda batch: session.run(None, feed_of(batch, names))


def onnx_own(subject: Subject, made: Converted, folder: Path) -> dict[str, Run]:
    """ONNX Runtime's own quantization of the float file, as its documentation recommends it."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file = made.files[0]
    prepared = folder / "prepared.onnx"
    quant_pre_process(file, prepared, skip_symbolic_shape=subject.is_transformer)
    static, dynamic = folder / "static.onnx", folder / "dynamic.onnx"
    quantize_static(
        prepared,
        static,
        _Reader(subject.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    found = {"quantize_static": onnx_run(static)}
    if subject.is_transformer:
        # Its shape inference does not take what the preparation makes of this model.
        quantize_dynamic(file, dynamic, per_channel=True, weight_type=QuantType.QInt8)
        found["quantize_dynamic"] = onnx_run(dynamic)
    return found


def onnx_kernels(made: Converted) -> str:
    """What ONNX Runtime executes, the most frequent first."""
    import onnx

    executed = made.files[0].with_name("executed.onnx")
    onnx_run(made.files[0], executed)
    counts = Counter(node.op_type for node in onnx.load(executed).graph.node)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


class _Reader:
    """Feeds ONNX Runtime's own calibration."""

    def __init__(self, batches: list[Batch]) -> None:
        self._feeds = iter([feed_of(batch, list(batch)) for batch in batches])

    def get_next(self) -> Feed | None:
        """The next batch, `None` after the last."""
        return next(self._feeds, None)


def openvino_run(file: Path) -> Run:
    """Load a file in OpenVINO with a float32 rest."""
    import openvino as ov

    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = ov.Core().compile_model(file, "CPU", {**hints, "ENABLE_CPU_PINNING": False})
    names = [entry.any_name for entry in compiled.inputs]
    return lambda batch: compiled(feed_of(batch, names))


def openvino_own(subject: Subject, made: Converted, folder: Path) -> dict[str, Run]:
    """NNCF's quantization of the float file."""
    file = quantized_by(
        "NNCF",
        made.files[0],
        subject.calibration,
        folder / "nncf.xml",
        is_transformer=subject.is_transformer,
    )
    return {"NNCF": openvino_run(file)}


def reported_kernels(made: Converted) -> str:
    """What the convert report says, the most frequent first."""
    counts = Counter(row.kernel for row in made.layers)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def no_own(subject: Subject, made: Converted, folder: Path) -> dict[str, Run]:
    """No route of others."""
    return {}


def converted_run(made: Converted) -> Run:
    """What fxmpq's own object does with a batch."""
    return made.run


def inductor_own(subject: Subject, made: Converted, folder: Path) -> dict[str, Run]:
    """What torchao's X86InductorQuantizer makes, with its weights frozen; and float by default."""
    example = subject.calibration[0]
    axes = (0, 1) if subject.is_transformer else (0,)
    shapes = {name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name in example}
    with torch.no_grad():
        program = torch.export.export(
            Outputs(subject.model).eval(), (example,), dynamic_shapes={"inputs": shapes}
        )
    exported = folder / "float.pt2"
    torch.export.save(program, exported)
    file = quantized_by(
        "torchao",
        exported,
        subject.calibration,
        folder / "torchao.pt2",
        is_transformer=subject.is_transformer,
    )
    module = torch.export.load(file).module(check_guards=False)
    return {"torchao": compiled_run(module), DEFAULT: default_run(Outputs(subject.model).eval())}


class Outputs(nn.Module):
    """A model of transformers on one mapping that returns logits, which any program can hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Batch) -> Tensor:
        """The logits."""
        logits: Tensor = self.model(**inputs).logits
        return logits


def compiled_run(module: nn.Module) -> Run:
    """Compile a module with its weights frozen, once a shape."""
    from torch._inductor import config

    compiled = torch.compile(module, dynamic=False)

    def run(batch: Batch) -> object:
        with torch.no_grad(), config.patch(freezing=True):
            return compiled(batch)

    return run


def default_run(module: nn.Module) -> Run:
    """Compile a float module without freezing its weights, which is the default, once a shape."""
    compiled = torch.compile(module, dynamic=False)

    def run(batch: Batch) -> object:
        with torch.no_grad():
            return compiled(batch)

    return run


RUNTIMES: Mapping[str, Runtime] = {
    "onnxruntime": Runtime(lambda made: onnx_run(made.files[0]), onnx_own, onnx_kernels),
    "openvino": Runtime(lambda made: openvino_run(made.files[0]), openvino_own, reported_kernels),
    "inductor": Runtime(converted_run, inductor_own, reported_kernels),
    "executorch": Runtime(converted_run, no_own, reported_kernels),
}
