"""Canonical passes: each takes a graph in place and says how many nodes it changed.

`CANONICAL_PASSES` is the whole pipeline, in order; nothing else registers a pass.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxmpq.graph.passes.drop_identities import drop_identities
from fxmpq.graph.passes.fold_batch_norm import fold_batch_norm
from fxmpq.graph.passes.fold_constants import fold_constants
from fxmpq.graph.passes.make_functional import make_functional
from fxmpq.graph.passes.make_linear import make_linear
from fxmpq.graph.passes.make_linear_einsum import make_linear_einsum
from fxmpq.graph.passes.merge_weights import merge_weights
from fxmpq.graph.passes.restore_batch_norm import restore_batch_norm
from fxmpq.graph.passes.store_experts import store_experts

Pass = Callable[[fx.GraphModule], int]

CANONICAL_PASSES: tuple[Pass, ...] = (
    make_functional,
    drop_identities,
    merge_weights,
    restore_batch_norm,
    make_linear,
    make_linear_einsum,
    store_experts,
    fold_constants,
    fold_batch_norm,
)
