"""How far rounding alone carries a simulation: the same one, computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxmpq.graph.batches import Batch, flat_inputs
from fxmpq.graph.run import float_outputs
from fxmpq.quantizers.modules import BiasCorrection, WeightQuantizer


class InFloat64(fx.Interpreter):
    """Runs a planned graph with the codes of its weights, and all else in float64."""

    def run_node(self, n: fx.Node) -> object:
        """Run a node in float64; quantizers of weights, and constants, as they are."""
        is_weight = n.op == "call_module" and isinstance(
            self.module.get_submodule(str(n.target)), (WeightQuantizer, BiasCorrection)
        )
        if is_weight or n.op in ("get_attr", "placeholder", "output"):
            return super().run_node(n)
        args, kwargs = pytree.tree_map(_widened, self.fetch_args_kwargs_from_env(n))
        return getattr(self, n.op)(n.target, args, kwargs)


def in_float64(planned: fx.GraphModule, batch: Batch) -> Tensor:
    """The first floating-point output of a simulation in float64.

    Where it differs from the simulation, a value fell on the other side of a step because float32
    rounded it; later layers amplify that, however a runtime rounds.

    Args:
        planned: With chosen precisions.
        batch: What the model takes.
    """
    with torch.no_grad():
        found = InFloat64(planned).run(*flat_inputs(planned, batch), enable_io_processing=False)
    return float_outputs(found)[0]


def _widened(value: object) -> object:
    """A tensor, or a type that is asked for, in float64 where it is float32."""
    if isinstance(value, Tensor) and value.dtype is torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value
