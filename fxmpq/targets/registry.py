"""The targets by name: one line each."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from fxmpq.errors import TargetError, closest
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.target import Target

TARGETS: Mapping[str, Target] = {
    REFERENCE.name: REFERENCE,
    ONNXRUNTIME.name: ONNXRUNTIME,
}


def get_target(target: str | Target) -> Target:
    """Find a target by name and check that its packages are installed.

    Args:
        target: A name, or a target of one's own, which is returned as it is.

    Raises:
        TargetError: If the name is unknown, or a package is missing, naming the extra that
            installs it.

    Examples:
        >>> get_target("reference").name
        'reference'
    """
    if isinstance(target, Target):
        found = target
    elif target in TARGETS:
        found = TARGETS[target]
    else:
        raise TargetError(f"no target {target!r}; there are {closest(target, TARGETS)}")
    for package, extra in found.packages.items():
        if importlib.util.find_spec(package) is None:
            raise TargetError(
                f"target {found.name!r} needs the package {package!r}, which is not installed; "
                f"install it with: pip install 'fxmpq[{extra}]'"
            )
    return found
