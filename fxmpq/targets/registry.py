"""The targets by name: one line each."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from fxmpq.errors import TargetError, closest
from fxmpq.targets.cuda import CUDA, CUDA_BF16
from fxmpq.targets.described.read import read_target
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.inductor import INDUCTOR, INDUCTOR_BF16
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.openvino import OPENVINO, OPENVINO_BF16
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.target import Target
from fxmpq.targets.tensorrt import TENSORRT

TARGETS: Mapping[str, Target] = {
    REFERENCE.name: REFERENCE,
    ONNXRUNTIME.name: ONNXRUNTIME,
    OPENVINO.name: OPENVINO,
    OPENVINO_BF16.name: OPENVINO_BF16,
    CUDA.name: CUDA,
    CUDA_BF16.name: CUDA_BF16,
    TENSORRT.name: TENSORRT,
    INDUCTOR.name: INDUCTOR,
    INDUCTOR_BF16.name: INDUCTOR_BF16,
    EXECUTORCH.name: EXECUTORCH,
}


def get_target(target: str | Path | Target) -> Target:
    """Find a target by name or file and check that its packages are installed.

    Args:
        target: A name; a TOML file that describes one, known by its ending `.toml`; or a target
            itself, which is returned as it is.

    Raises:
        TargetError: If the name is unknown, a file cannot be used, a package is missing, naming
            the extra that installs it, or this machine lacks something else.

    Examples:
        >>> get_target("reference").name
        'reference'
    """
    if isinstance(target, Target):
        found = target
    elif Path(target).suffix == ".toml":
        found = read_target(target, TARGETS)
    elif str(target) in TARGETS:
        found = TARGETS[str(target)]
    else:
        raise TargetError(
            f"no target {str(target)!r}; there are {closest(str(target), TARGETS)}, and files that "
            "describe one, ending in .toml"
        )
    for package, extra in found.packages.items():
        if importlib.util.find_spec(package) is None:
            raise TargetError(
                f"target {found.name!r} needs the package {package!r}, which is not installed; "
                f"install it with: pip install 'fxmpq[{extra}]'"
            )
    if found.check is not None:
        found.check()
    return found
