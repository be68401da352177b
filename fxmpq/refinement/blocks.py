"""Blocks: stretches of a graph between points where a single tensor carries everything on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxmpq.graph.layers import is_real_tensor
from fxmpq.graph.state import node_shape, require
from fxmpq.quantizers.modules import ActivationQuantizer


@dataclass(frozen=True)
class Block:
    """A stretch of a graph with one output.

    Args:
        nodes: In graph order.
        output: The last of them that depends on a layer and is real: what the block computes.
    """

    nodes: tuple[fx.Node, ...]
    output: fx.Node


def find_blocks(graph: fx.GraphModule) -> list[Block]:
    """Cut a graph into blocks, found from its structure.

    The graph can be cut behind a node if that node's value is all that later nodes read of what
    layers have computed so far; what depends on no layer (attention masks, positions) may be
    read across. Between the fork and the sum of a residual branch two values are alive, so there
    is no cut, and a residual block comes out whole. What only the model's output reads (hidden
    states, a second head) holds nothing together: a branch that ends there is a block, and the
    next one starts where it forked. A stretch without layers (the ReLU behind the sum) joins the
    block before it if it keeps the output's size, else the one behind (pooling before a
    classifier).

    Args:
        graph: A prepared graph.

    Returns:
        The blocks in graph order; together they hold every node but the output. Each has a layer
        in it, but for a last one of what the model returns without any.
    """
    layers = {
        layer.node for group in require(graph, stage="prepared").groups for layer in group.layers
    }
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    cuts, carriers = _cuts(graph, nodes, layers)
    blocks: list[list[fx.Node]] = []
    pending: list[fx.Node] = []
    for stretch in _stretches(nodes, cuts):
        if any(node.name in layers for node in stretch):
            blocks.append([*pending, *stretch])
            pending = []
        elif not pending and blocks and _goes_on(blocks[-1][-1], stretch[-1]):
            blocks[-1] += stretch
        else:
            pending += stretch
    if pending and blocks and not _is_end(blocks[-1][-1]):
        blocks[-1] += pending
    elif pending:
        blocks.append(pending)
    return [Block(tuple(found), _output(found, carriers)) for found in blocks]


def _stretches(nodes: Sequence[fx.Node], cuts: set[fx.Node]) -> list[list[fx.Node]]:
    """Nodes up to and with each cut, and what follows the last one."""
    stretches: list[list[fx.Node]] = [[]]
    for node in nodes:
        stretches[-1].append(node)
        if node in cuts:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _cuts(
    graph: fx.GraphModule, nodes: Sequence[fx.Node], layers: set[str]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes behind which the graph can be cut; and all real ones that depend on a layer."""
    modules: Mapping[str, torch.nn.Module] = dict(graph.named_modules())
    last: dict[fx.Node, int] = {}
    origin: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last[origin.get(source, source)] = index
        # A quantizer's result counts as its source, from which it can be found again.
        if isinstance(modules.get(str(node.target)), ActivationQuantizer):
            source = node.all_input_nodes[0]
            origin[node] = origin.get(source, source)
    deep: set[fx.Node] = set()
    alive: set[fx.Node] = set()
    cuts: dict[fx.Node, None] = {}
    for index, node in enumerate(nodes):
        if node.name in layers or any(source in deep for source in node.all_input_nodes):
            deep.add(node)
            alive.add(origin.get(node, node))
        alive = {value for value in alive if last.get(value, -1) > index}
        if node not in deep or node in origin or not is_real_tensor(node):
            continue
        if alive == {node} or (node not in last and alive <= set([*cuts][-1:])):
            cuts[node] = None
    return set(cuts), {node for node in deep - origin.keys() if is_real_tensor(node)}


def _output(nodes: Sequence[fx.Node], carriers: set[fx.Node]) -> fx.Node:
    return next((node for node in reversed(nodes) if node in carriers), nodes[-1])


def _is_end(node: fx.Node) -> bool:
    """Whether only the model's output reads a node, if anything does."""
    return all(reader.op == "output" for reader in node.users)


def _goes_on(node: fx.Node, later: fx.Node) -> bool:
    """Whether a stretch that ends with `later` belongs to the block that ends with `node`."""
    shapes = node_shape(node), node_shape(later)
    sizes = [None if shape is None else math.prod(shape) for shape in shapes]
    return not _is_end(node) and sizes[0] == sizes[1]
