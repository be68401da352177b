"""What runs converted models on this machine, and what decides how fast."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import fx

from fxmpq.graph.batches import Batch

Run = Callable[[Batch], object]
Conditions = Mapping[str, str | int]


@dataclass(frozen=True)
class Runtime:
    """What makes runnable models of planned graphs.

    Args:
        name: The target's name.
        load: Takes a planned graph and returns what runs a batch.
        packages: Modules whose versions decide how fast models run.
        further: What decides it besides, by name; nothing by default.
    """

    name: str
    load: Callable[[fx.GraphModule], Run]
    packages: tuple[str, ...]
    further: Callable[[], Conditions] = dict

    def conditions(self) -> Conditions:
        """All that decides how fast a model runs besides the model.

        Returns:
            The target's name, the versions of its packages, of torch and of fxmpq, the name of
            the CPU and the number of threads, or what the target tells of them; and what it tells
            besides.
        """
        packages = dict.fromkeys([*self.packages, "torch", "fxmpq"])
        return {
            "target": self.name,
            "packages": ", ".join(f"{name} {_version(name)}" for name in packages),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            **self.further(),
        }

    def threads(self) -> int:
        """In how many threads models run."""
        return int(self.conditions()["threads"])


def _version(package: str) -> str:
    """A package's version, also where another distribution than that of its name brought it."""
    return str(import_module(package).__version__)


def cpu_name(table: Path = Path("/proc/cpuinfo")) -> str:
    """The name of this machine's CPU, as its maker calls it where the system tells.

    Args:
        table: Where Linux tells it.
    """
    lines = table.read_text(errors="replace").splitlines() if table.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
