"""The sweep: what changes at the output when groups change, re-running only what they reach."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmpq.errors import FxmpqError, closest
from fxmpq.formats import Precision
from fxmpq.graph.batches import flat_inputs
from fxmpq.graph.state import Group, copy_graph, require, state_of
from fxmpq.graph.switch import switch_group

Changes = Mapping[str, str | Precision]


class Sweep(fx.Interpreter):
    """Keeps every value of one batch in the base graph and re-runs what a change reaches.

    `start` runs a batch once. Each `outputs(changes)` switches some groups, runs the nodes
    downstream of the quantizers that this changes, on top of the kept values, and switches
    back; a change that alters no quantizer costs nothing. Outputs equal those of a whole pass
    bit for bit, since the same operators see the same tensors.

    Memory: every value of one batch; inside `fixed`, also the values downstream of what is
    fixed, hence at most twice as much. Weights are quantized anew in each run and not kept.

    The sweep works on its own copy of the graph, and records no gradients if it is used inside
    `measuring`.

    Args:
        graph: A calibrated graph; not changed.
        base: Precision per group while nothing is changed; groups left out stay float.

    Raises:
        FxmpqError: If the base names an unknown group or a precision it does not have.

    Examples:
        >>> import fxmpq
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> batch = torch.randn(3, 4)
        >>> prepared = fxmpq.prepare(fxmpq.trace(model, batch), "reference", candidates=["w4a8"])
        >>> sweep = Sweep(fxmpq.calibrate(prepared, [batch]))
        >>> with measuring():
        ...     (exact,) = sweep.start([batch])
        ...     (changed,) = sweep.outputs({"2": "w4a8"})
        >>> torch.equal(exact, model(batch)), torch.equal(changed, exact)
        (True, False)
    """

    def __init__(self, graph: fx.GraphModule, base: Changes | None = None) -> None:
        self.network = copy_graph(graph)
        super().__init__(self.network, garbage_collect_values=False)
        self.groups = {group.name: group for group in require(graph, stage="calibrated").groups}
        self._nodes = list(self.network.graph.nodes)
        self._now = dict.fromkeys(self.groups, Precision())
        self._values: dict[fx.Node, object] = {}
        self._reach: dict[frozenset[str], list[fx.Node]] = {}
        self._switch(base or {})

    @property
    def is_float(self) -> bool:
        """Whether every group is in float now."""
        return all(precision.is_float for precision in self._now.values())

    def start(self, inputs: Sequence[object]) -> Sequence[object]:
        """Run the base graph on a batch and keep every value.

        Args:
            inputs: Flat inputs, as `flat_inputs` gives them.

        Returns:
            The graph's flat outputs.
        """
        self._values = {}
        self.run(*inputs, enable_io_processing=False)
        self._values, self.env = self.env, {}
        return _as_sequence(self._values[self._nodes[-1]])

    def outputs(self, changes: Changes) -> Sequence[object]:
        """The flat outputs with some groups at other precisions than the base.

        Args:
            changes: Precision per changed group.

        Returns:
            The graph's flat outputs on the batch of `start`; those that no change reaches are
            the base's own.

        Raises:
            FxmpqError: If there is no such group or precision, or no batch was started.
        """
        with self._switched(changes) as changed:
            values = self._rerun(changed, keep=False)
        last = self._nodes[-1]
        return _as_sequence(values.get(last, self._values[last]))

    @contextmanager
    def fixed(self, changes: Changes) -> Iterator[None]:
        """Make some changes part of the base for a while, as one half of pairs.

        Within, `outputs(further)` runs only what lies downstream of the further changes.

        Args:
            changes: Precision per changed group.
        """
        outer = self._values
        with self._switched(changes) as changed:
            self._values = {**outer, **self._rerun(changed, keep=True)}
            try:
                yield
            finally:
                self._values = outer

    def whole(self, inputs: Sequence[object], changes: Changes) -> Sequence[object]:
        """A whole pass on any inputs with some groups changed; keeps nothing."""
        with self._switched(changes):
            outputs = fx.Interpreter(self.network).run(*inputs, enable_io_processing=False)
        return _as_sequence(outputs)

    @contextmanager
    def _switched(self, changes: Changes) -> Iterator[frozenset[str]]:
        """Switch groups for a while; yields the quantizer modules that this changes."""
        before = dict(self._now)
        try:
            yield self._switch(changes)
        finally:
            self._switch(before)

    def _switch(self, changes: Changes) -> frozenset[str]:
        wanted = {name: self._checked(name, choice) for name, choice in changes.items()}
        changed: set[str] = set()
        for name, precision in wanted.items():
            if precision == self._now[name]:
                continue
            group = self.groups[name]
            before = self._active(group)
            switch_group(self.network, group, precision)
            self._now[name] = precision
            now = self._active(group)
            changed |= {module for module in now if now[module] != before[module]}
        return frozenset(changed)

    def _checked(self, name: str, precision: str | Precision) -> Precision:
        if name not in self.groups:
            raise FxmpqError(f"no group {name!r}; closest: {closest(name, self.groups)}")
        found = Precision.parse(precision)
        return found if found.is_float else self.groups[name].candidate(found)

    def _active(self, group: Group) -> dict[str, object]:
        """What each of a group's quantizers simulates now, by module name."""
        names = list(group.activation_quantizers)
        for layer in group.layers:
            names += [name for name in (layer.weight_quantizer, layer.bias_correction) if name]
        return {name: getattr(self.network.get_submodule(name), "active", None) for name in names}

    def _downstream(self, changed: frozenset[str]) -> list[fx.Node]:
        """Nodes that depend on one of the modules, in graph order."""
        if changed not in self._reach:
            reached: set[fx.Node] = set()
            for node in self._nodes:
                is_changed = node.op == "call_module" and node.target in changed
                if is_changed or any(source in reached for source in node.all_input_nodes):
                    reached.add(node)
            self._reach[changed] = [node for node in self._nodes if node in reached]
        return self._reach[changed]

    def _rerun(self, changed: frozenset[str], *, keep: bool) -> dict[fx.Node, object]:
        """Run what lies downstream of the modules; values that are read no more go, or stay."""
        if not self._values:
            raise FxmpqError("no batch to re-run; call start(inputs) first")
        nodes = self._downstream(changed)
        last_use = {source: node for node in nodes for source in node.all_input_nodes}
        self.env = dict(self._values)
        found: dict[fx.Node, object] = {}
        for node in nodes:
            found[node] = self.env[node] = self.run_node(node)
            for source in () if keep else node.all_input_nodes:
                if last_use[source] is node and source in found:
                    del found[source], self.env[source]
        self.env = {}
        return found


class SweptModel(nn.Module):
    """Stands in for the graph inside a loss, so that a loss is swept like an output.

    The first call after `begin` runs the base graph and keeps its values. Later calls with
    equal inputs return the outputs of the sweep under `changes`; calls with other inputs (a
    loss that runs the model on two halves, say) run the whole graph. It is called like the
    model, returns what the model returns (copies, so that a loss may write to them), and has
    the graph's attributes.

    Args:
        sweep: Whose base and changes it shows.
    """

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self.network = sweep.network
        self._sweep = sweep
        self._signature = inspect.signature(sweep.network.forward)
        self._inputs: list[object] | None = None
        self.changes: Changes = {}
        self.eval()

    @property
    def is_started(self) -> bool:
        """Whether the model has been called since `begin`."""
        return self._inputs is not None

    def begin(self) -> None:
        """Forget the batch; the next call brings another."""
        self._inputs = None
        self.changes = {}

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's outputs under the changes."""
        inputs = self._flat(*args, **kwargs)
        if self._inputs is None:
            self._inputs = inputs
            outputs = self._sweep.start(inputs)
        elif _equal(inputs, self._inputs):
            outputs = self._sweep.outputs(self.changes)
        else:
            outputs = self._sweep.whole(inputs, self.changes)
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        return self.network.graph.process_outputs(own)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """What the stand-in lacks is looked up in the graph."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found: Tensor | nn.Module = getattr(super().__getattr__("network"), name)
            return found

    def _flat(self, *args: object, **kwargs: object) -> list[object]:
        bound = self._signature.bind(*args, **kwargs).arguments
        has_names = state_of(self.network).call_spec.child(1).num_children > 0
        return flat_inputs(self.network, bound if has_names else tuple(bound.values()))


@contextmanager
def measuring() -> Iterator[None]:
    """No gradients, and tensors that ordinary code may use, also inside inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _equal(inputs: Sequence[object], others: Sequence[object]) -> bool:
    return all(
        a is b or (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)
        for a, b in zip(inputs, others, strict=True)
    )


def _as_sequence(outputs: object) -> Sequence[object]:
    return outputs if isinstance(outputs, (tuple, list)) else pytree.tree_leaves(outputs)
