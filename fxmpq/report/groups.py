"""The groups of a prepared graph as a tree: what may be quantized, together with what, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.tree import Tree
from torch import fx

from fxmpq.costs.weights import weight_bytes
from fxmpq.formats import Precision
from fxmpq.graph.findings import Missed
from fxmpq.graph.joins import describe_join
from fxmpq.graph.layers import place_of
from fxmpq.graph.state import GraphState, Group, Layer, LeftFloat, Member, require
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.report.sizes import fixed_size_lines
from fxmpq.wording import counted, percent

_FLOAT = Precision()
_INDENT = 4


def describe_groups(graph: fx.GraphModule) -> Tree:
    """Show what a prepared graph can be quantized to, for the terminal.

    A branch for each group: its operator with what the target fuses into it, as `conv-relu`, and
    the weight's shape; its candidates (the chosen one as `>w4a8<`, once a plan is applied); the
    weights' size in float and in fewest bits; and multiply-accumulates for one sample. Under it
    stand its layers and products, if there are several, with why they share a precision; rules of
    the target that did not fire, with the reason; and the tensors that are stored quantized. The
    last branches are tensors of one range, if the target wants any, what stays in float, by
    reason, and sizes of samples and sequences that the export fixed, with its reason.

    Args:
        graph: From `prepare` or a later step.

    Returns:
        A Rich tree; print it with `rich.print`.

    Raises:
        FxmpqError: If the graph has no groups yet.
    """
    return _Drawing(graph).tree()


class _Drawing:
    """Draws a graph's groups, columns aligned.

    Args:
        graph: A prepared graph.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        state = require(graph, stage="prepared")
        self._graph, self._state = graph, state
        self._groups = [group for group in state.groups if group.candidates != (_FLOAT,)]
        self._fusions = {fusion.layer: fusion.name for fusion in state.fusions if fusion.layer}
        self._results = {f.nodes[-1]: f.name for f in state.fusions if not f.layer}
        self._missed: dict[str, list[Missed]] = {}
        for entry in state.missed:
            self._missed.setdefault(entry.place, []).append(entry)
        self._calls = {node.target: node for node in graph.graph.find_nodes(op="call_module")}
        self._width = self._widths()

    def tree(self) -> Tree:
        """The whole of it."""
        tree = Tree(_heading(self._state, self._groups))
        for group in self._groups:
            self._add_group(tree, group)
        self._add_shared_ranges(tree)
        if self._state.left_float:
            _add_left_float(tree, self._state)
        if self._state.fixed_sizes:
            branch = tree.add("[bold]sizes that are fixed[/]")
            for line in fixed_size_lines(self._state.fixed_sizes):
                branch.add(escape(line))
        return tree

    def _widths(self) -> tuple[int, ...]:
        """Of a name, an operator, the candidates and a size."""
        rows: list[tuple[str, ...]] = [self._cells(group) for group in self._groups]
        for group in self._groups:
            if len(group.members) > 1:
                for member in group.members:
                    name = " " * _INDENT + _own_name(member.name, group)
                    rows.append((name, self._operator(member)))
        return tuple(max((len(r[i]) for r in rows if i < len(r)), default=0) for i in range(4))

    def _cells(self, group: Group) -> tuple[str, str, str, str]:
        members = group.members
        what = _number_of([group], ", ") if len(members) > 1 else self._operator(members[0])
        names = " ".join(self._candidate(group, candidate) for candidate in group.candidates)
        smallest = min(group.candidates, key=lambda candidate: candidate.sort_key)
        sizes = [weight_bytes(group, precision) for precision in (_FLOAT, smallest)]
        size = " to ".join(counted(found, "B") for found in sizes) if sizes[0] else ""
        return group.name, what, names, size

    def _candidate(self, group: Group, candidate: Precision) -> str:
        is_chosen = str(candidate) == self._state.choices.get(group.name)
        return f">{candidate}<" if is_chosen else str(candidate)

    def _add_group(self, tree: Tree, group: Group) -> None:
        cells = self._cells(group)
        name, what, names, size = (
            escape(cell.ljust(width)) for cell, width in zip(cells, self._width, strict=True)
        )
        names = " ".join(
            f"[reverse]{word}[/]" if word.startswith(">") else word for word in names.split(" ")
        )
        macs = _macs_text(sum(member.macs for member in group.members))
        line = f"[bold]{name}[/]  [green]{what}[/]  [cyan]{names}[/]  {size}  {macs}"
        branch = tree.add(line.rstrip())
        if len(group.members) > 1:
            for member in group.members:
                self._add_reasons(branch.add(self._member_line(member, group)), member)
        else:
            self._add_reasons(branch, group.members[0])
        for formats, places in self._stored(group).items():
            branch.add(f"[dim]stored as[/] {formats}[dim]: {escape(', '.join(places))}[/]")

    def _member_line(self, member: Member, group: Group) -> str:
        name = _own_name(member.name, group).ljust(self._width[0] - _INDENT)
        inside = {found.name for found in group.members}
        joins = [
            describe_join(join, _own_name(join.other, group))
            for join in self._state.joins
            if join.layer == member.name and join.other in inside
        ]
        why = ", ".join(text for text in (_macs_text(member.macs), *dict.fromkeys(joins)) if text)
        what = self._operator(member).ljust(self._width[1] if why else 0)
        line = f"{escape(name)}  [green]{escape(what)}[/]"
        return f"{line}  [dim]{escape(why)}[/]" if why else line

    def _add_reasons(self, branch: Tree, member: Member) -> None:
        """Why rules of the target did not fire; those of one reason on a line."""
        by_reason: dict[str, list[str]] = {}
        for entry in self._missed.get(member.name, ()):
            by_reason.setdefault(entry.reason, []).append(entry.rule)
        for reason, rules in by_reason.items():
            branch.add(f"[dim]not {' or '.join(dict.fromkeys(rules))}: {escape(reason)}[/]")

    def _operator(self, member: Member) -> str:
        """A member's kind with what the target fuses into it, and its weight's shape."""
        kind = self._fusions.get(member.name, member.kind)
        if not isinstance(member, Layer):
            return kind
        return f"{kind} {'x'.join(map(str, member.weight_shape))}"

    def _stored(self, group: Group) -> dict[str, list[str]]:
        """Formats to the tensors stored in them, by the place that computes each."""
        found: dict[str, list[str]] = {}
        for name in group.activation_quantizers:
            quantizer = self._graph.get_submodule(name)
            assert isinstance(quantizer, ActivationQuantizer)
            formats = " ".join(candidate.name for candidate in quantizer.formats)
            found.setdefault(formats, []).append(self._place(name))
        return found

    def _place(self, quantizer: str) -> str:
        """Where the tensor that a quantizer reads is computed, and by which fusion of no layer."""
        source = self._calls[quantizer].args[0]
        assert isinstance(source, fx.Node)
        fusion = self._results.get(source.name)
        return place_of(source) + (f" ({fusion})" if fusion else "")

    def _add_shared_ranges(self, tree: Tree) -> None:
        rest = [entry for entry in self._state.missed if entry.rule.startswith("one range")]
        if not self._state.shared_ranges and not rest:
            return
        branch = tree.add("[bold]tensors of one range[/]")
        for names in self._state.shared_ranges:
            branch.add(f"[dim]{escape(', '.join(map(self._place, names)))}[/]")
        for entry in rest:
            branch.add(f"[dim]not {escape(f'{entry.rule} ({entry.place}): {entry.reason}')}[/]")


def _heading(state: GraphState, quantized: Sequence[Group]) -> str:
    sizes = [sum(weight_bytes(g, _FLOAT) for g in groups) for groups in (quantized, state.groups)]
    macs = _macs(quantized)
    every = _macs(state.groups) + sum(entry.macs for entry in state.left_float)
    text = (
        f"[bold]{_number_of(quantized, ' and ')} in {len(quantized)} groups for {state.target}[/]: "
        f"{counted(sizes[0], 'B')} of weights ({percent(sizes[0] / max(sizes[1], 1))} of those in "
        f"layers), {counted(macs)} MACs a sample ({percent(macs / max(every, 1))} of all)"
    )
    fused = Counter(fusion.name for fusion in state.fusions)
    if fused:
        text += "\nfused: " + ", ".join(f"{count} {name}" for name, count in fused.items())
    return text


def _number_of(groups: Sequence[Group], between: str) -> str:
    """How many members groups have, of which sort."""
    counts = {
        "layer": sum(len(group.layers) for group in groups),
        "product": sum(len(group.products) for group in groups),
    }
    named = [f"{count} {sort}{'s' * (count != 1)}" for sort, count in counts.items() if count]
    return between.join(named) or "0 layers"


def _own_name(name: str, group: Group) -> str:
    """What tells a member from the others of its group: its path behind what they share."""
    paths = [found.name.split(".")[:-1] for found in group.members]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(name.split(".")[shared:])


def _macs(groups: Iterable[Group]) -> int:
    return sum(member.macs for group in groups for member in group.members)


def _macs_text(macs: int) -> str:
    return f"{counted(macs)} MACs" if macs else ""


def _add_left_float(tree: Tree, state: GraphState) -> None:
    by_reason: dict[str, list[LeftFloat]] = {}
    for entry in state.left_float:
        by_reason.setdefault(entry.reason, []).append(entry)
    macs = {member.name: member.macs for group in state.groups for member in group.members}
    branch = tree.add(f"[bold]stays in float[/]  {len(state.left_float)} in all")
    for reason, entries in by_reason.items():
        total = _macs_text(sum(entry.macs or macs.get(entry.name, 0) for entry in entries))
        twig = branch.add(escape(reason) + (f", {total}" if total else ""))
        for entry in entries:
            twig.add(f"[dim]{escape(entry.name)}[/]")
