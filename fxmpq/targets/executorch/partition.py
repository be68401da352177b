"""Which parts of a program XNNPACK gets: by ExecuTorch's rules, but for what it gets wrong.

XNNPACK has linear layers that multiply real numbers by stored codes; ExecuTorch 1.5 writes and
runs them, but does not hand them over by itself.
"""

from __future__ import annotations

from torch import fx
from torch.export import ExportedProgram

from fxmpq.targets.executorch.packages import (
    ALL_PARTITIONER_CONFIGS,
    ConfigPrecisionType,
    LinearConfig,
    UnsqueezeCopyConfig,
    XnnpackPartitioner,
    is_dequant,
    is_dynamic_qdq,
)


class StoredLinear(LinearConfig):  # type: ignore[misc]  # ExecuTorch has no types
    """Linear layers, those without a bias on real numbers and stored codes among them."""

    def get_deps(self, node: fx.Node, ep: ExportedProgram) -> tuple[bool, list[fx.Node]]:
        """Whether a layer is handed over, and what goes with it."""
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        if is_dequant(weight) and len(node.args) == 2 and not self._is_on_codes(node, ep):
            return True, [weight, *weight.all_input_nodes]
        found: tuple[bool, list[fx.Node]] = super().get_deps(node, ep)
        return found

    def _is_on_codes(self, node: fx.Node, ep: ExportedProgram) -> bool:
        """Whether it reads codes, and where their range is calibrated writes some too."""
        source = node.args[0]
        if not is_dequant(source) or is_dynamic_qdq(source):
            return bool(is_dequant(source))
        writes_codes, _ = self._get_output_deps(node, ep, ConfigPrecisionType.STATIC_QUANT)
        return bool(writes_codes)


class Unsqueeze(UnsqueezeCopyConfig):  # type: ignore[misc]  # ExecuTorch has no types
    """New dimensions, where one size is free at most: XNNPACK refuses more when it gets them."""

    def check_constraints(self, node: fx.Node, ep: ExportedProgram) -> bool:
        """Whether a node is handed over."""
        free = [size for size in node.meta["val"].shape if not isinstance(size, int)]
        return len(free) < 2 and bool(super().check_constraints(node, ep))


_OWN = {LinearConfig: StoredLinear, UnsqueezeCopyConfig: Unsqueeze}


def partitioner() -> XnnpackPartitioner:
    """What picks the parts."""
    return XnnpackPartitioner(configs=[_OWN.get(found, found) for found in ALL_PARTITIONER_CONFIGS])
