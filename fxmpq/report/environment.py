"""The environment: what measured times and results depend on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("fxmpq", "torch", "mip", "numpy", "transformers", "onnx", "onnxruntime", "openvino")
_CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict[str, str]:
    """Describe the machine and the software, for a report.

    Returns:
        `python`, `system`, `cpu` (model name), `cores` (those this process may use),
        `threads` (torch's), and the version of each package involved that is installed.

    Examples:
        >>> sorted(environment())[:3]
        ['cores', 'cpu', 'fxmpq']
    """
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": str(_usable_cores()),
        "threads": str(torch.get_num_threads()),
    }
    versions = {package: package_version(package) for package in _PACKAGES}
    return found | {package: version for package, version in versions.items() if version}


def package_version(package: str) -> str | None:
    """An installed package's version, or `None` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name(cpu_info: Path = _CPU_INFO) -> str:
    """The processor's model name, or its architecture where the system does not tell.

    Args:
        cpu_info: Where Linux lists its processors.
    """
    if cpu_info.is_file():
        for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
