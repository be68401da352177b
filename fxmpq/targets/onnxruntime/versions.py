"""Which release of ONNX Runtime runs a file."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from fxmpq.errors import TargetError

FIRST_RELEASE = {
    "weights of 2 bits": (1, 24),
    "embeddings of 2 bits in blocks": (1, 27),
}
"""The first releases that ran such files with the right numbers; 1.23 ran all others."""


def check_release(proto: onnx.ModelProto, installed: str) -> None:
    """Refuse a file that the installed runtime does not run.

    Args:
        proto: The model.
        installed: Version of the runtime, as `1.31.0`.

    Raises:
        TargetError: If it is older than the first release that runs the model.
    """
    major, minor = (int(part) for part in installed.split(".")[:2])
    missing = [what for what in _found(proto) if FIRST_RELEASE[what] > (major, minor)]
    if not missing:
        return
    first = max(FIRST_RELEASE[what] for what in missing)
    raise TargetError(
        f"the file has {' and '.join(missing)}, which ONNX Runtime runs from {first[0]}.{first[1]} "
        f"on, and {installed} is installed; take a newer one, or candidates of 4 and 8 bits"
    )


def _found(proto: onnx.ModelProto) -> list[str]:
    """What a file has that not every release runs."""
    operators = {
        node.op_type
        for node in proto.graph.node
        if any(entry.name == "bits" and entry.i == 2 for entry in node.attribute)
    }
    is_stored = any(entry.data_type == TensorProto.INT2 for entry in proto.graph.initializer)
    found = ["weights of 2 bits"] if is_stored or operators else []
    if "GatherBlockQuantized" in operators:
        found.append("embeddings of 2 bits in blocks")
    return found
