"""What kernel rules must know of a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """A device, as far as the choice of kernels depends on it.

    Args:
        kind: Its type, as torch names it: `cpu`, `cuda`.
        capability: Compute capability of an NVIDIA GPU, `(9, 0)` for Hopper; `None` of others.

    Examples:
        >>> str(DeviceFacts("cuda", (9, 0))), str(DeviceFacts("cpu"))
        ('cuda sm_90', 'cpu')
    """

    kind: str
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.capability is None:
            return self.kind
        return f"{self.kind} sm_{self.capability[0]}{self.capability[1]}"

    def reaches(self, capability: tuple[int, int]) -> bool:
        """Whether it is a GPU of at least this compute capability, or no GPU at all."""
        if self.kind != "cuda":
            return True
        return self.capability is not None and self.capability >= capability


def device_facts(device: torch.device) -> DeviceFacts:
    """Ask a device for its facts.

    Args:
        device: Where a graph's tensors lie.

    Examples:
        >>> device_facts(torch.device("cpu"))
        DeviceFacts(kind='cpu', capability=None)
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return DeviceFacts(device.type, capability)
