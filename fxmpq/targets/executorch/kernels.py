"""Reading back which kernels XNNPACK ran, from ExecuTorch's trace of a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer, Member
from fxmpq.targets.executorch.loaded import ExecutorchModel
from fxmpq.targets.executorch.packages import flatc_decompile
from fxmpq.targets.executorch.places import Place

_SCHEMAS = ("etdump_schema_flatcc.fbs", "scalar_type.fbs")
_LAYERS = ("Convolution", "Deconvolution", "Fully Connected")
_STORED = ("QC8", "QS8", "QC4W", "QB4W")


def executed_kernels(traced: ExecutorchModel, inputs: Sequence[object]) -> list[list[str]]:
    """The kernels of layers that XNNPACK ran, by its calls, each in the order they ran.

    Args:
        traced: A program that is traced.
        inputs: Flat, to run it on.

    Returns:
        Names as `Convolution (NHWC, QC8) IGEMM`; a list a call of XNNPACK.
    """
    calls: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        for event in _events(traced.events(inputs, Path(name)), Path(name)):
            if event.get("name") == "DELEGATE_CALL":
                calls.setdefault(_instruction(event), [])
            kernel = event.get("delegate_debug_id_str")
            if isinstance(kernel, str):
                ran = calls.setdefault(_instruction(event), [])
                ran += [kernel.partition(" #")[0]] if kernel.startswith(_LAYERS) else []
    return [calls[instruction] for instruction in sorted(calls)]


class Kernels:
    """The kernels that run, by layer.

    Args:
        places: Where layers run, by the names of their stored weights.
        executed: From `executed_kernels`.
        layers: Of the planned graph, in the order they run.
        names: Name of the tensor that holds each layer's weight in the file, by layer.
    """

    def __init__(
        self,
        places: Mapping[str, Sequence[Place]],
        executed: Sequence[Sequence[str]],
        names: Mapping[str, str],
    ) -> None:
        self._executed = executed
        waiting = {name: list(found) for name, found in places.items()}
        self._places: dict[str, Place] = {}
        for layer, name in names.items():
            if waiting.get(name):
                self._places[layer] = waiting[name].pop(0)

    def of_quantized(self, member: Member, precision: Precision) -> tuple[str, str]:
        """A quantized layer's kernel, and why it differs from what was asked where it does."""
        kernel = self.of_float(member)
        place = self._places.get(member.name)
        if kernel == "float":
            return "unknown", "the program that was written does not show it"
        if isinstance(member, Layer) and member.kind == "embedding":
            return f"{kernel} on stored codes", ""
        if place is not None and place.delegate is None:
            return kernel, "XNNPACK has no kernel for it"
        is_on_codes = precision.activation is None or "(NC, F32, " not in kernel
        if not is_on_codes or not any(kind in kernel for kind in _STORED):
            return kernel, "XNNPACK has no kernel from codes to what its result is kept in"
        if precision.weight_bits != 8 and "4W" not in kernel:
            return kernel, "stored in 8 bits: XNNPACK takes 4-bit weights of even numbers of inputs"
        return kernel, ""

    def of_float(self, member: Member) -> str:
        """The kernel of a layer that stays float; `float` where it is not known."""
        place = self._places.get(member.name)
        if place is None:
            return "float"
        if place.delegate is None:
            return f"portable {place.operator}"
        ran = self._executed[place.delegate] if place.delegate < len(self._executed) else ()
        return ran[place.position] if place.position < len(ran) else "float"


def _events(data: bytes, folder: Path) -> list[dict[str, object]]:
    """The timed events of a trace."""
    source = files("executorch") / "devtools" / "etdump"
    for name in _SCHEMAS:
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "trace.bin").write_bytes(data)
    binary = str(folder / "trace.bin")
    flatc_decompile(str(folder), str(folder / _SCHEMAS[0]), binary, ["--size-prefixed"])
    trace = json.loads((folder / "trace.json").read_text())
    return [
        event["profile_event"]
        for run in trace["run_data"]
        for event in run.get("events", ())
        if "profile_event" in event
    ]


def _instruction(event: Mapping[str, object]) -> int:
    found = event.get("instruction_id", -1)
    assert isinstance(found, int)
    return found
