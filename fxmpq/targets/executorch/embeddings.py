"""Embeddings whose codes are stored in fewer than 8 bits, in operators that every build has."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxmpq.graph.attributes import get_tensor
from fxmpq.targets.lowering import store_tensor

aten = torch.ops.aten


def pack_embeddings(graph: fx.GraphModule) -> None:
    """Store tables of codes in the 2 or 4 bits that hold them, in place.

    What looks a table's rows up then looks up packed ones and takes them apart: with shifts, so
    that ExecuTorch's portable kernels run it.

    Args:
        graph: In the form of `to_decomposed`, where an embedding reads `int8` codes.
    """
    for node in graph.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table = node.args[0]
        if not isinstance(table, fx.Node) or table.op != "get_attr":
            continue
        codes = get_tensor(graph, str(table.target))
        bits = _bits_of(codes)
        if codes.dtype is torch.int8 and bits < 8:
            _unpack_rows(graph, node, codes, bits)


def packed_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[rows, width]` into bytes `[rows, ceil(width * bits / 8)]`.

    With `k = 8 / bits` codes a byte, the columns are cut into `k` equal runs, the last filled up,
    and byte `j` holds column `j` of every run, that of the first one in the lowest bits, each
    as `code + 2^(bits - 1)`.

    Args:
        codes: `int8`, within `bits` bits.
        bits: 2 or 4.

    Examples:
        >>> packed_columns(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4).tolist()
        [[128, 143]]
    """
    runs = 8 // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % runs))
    shifted = (filled.int() + (1 << (bits - 1))).chunk(runs, dim=1)
    packed = torch.zeros_like(shifted[0])
    for run, part in enumerate(shifted):
        packed |= part << (run * bits)
    return packed.to(torch.uint8)


def _bits_of(codes: Tensor) -> int:
    """The fewest bits, of 2, 4 and 8, that hold all codes."""
    low, high = int(codes.min()), int(codes.max())
    return next(bits for bits in (2, 4, 8) if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1))


def _unpack_rows(graph: fx.GraphModule, node: fx.Node, codes: Tensor, bits: int) -> None:
    """Let an embedding look up packed rows, and its readers read codes in real numbers."""
    stored = node.args[0]
    assert isinstance(stored, fx.Node)
    packed = store_tensor(graph, f"packed_{stored.target}", packed_columns(codes, bits), node)
    node.update_arg(0, packed)
    casts = list(node.users)
    call = graph.graph.call_function
    with graph.graph.inserting_before(node.next):
        parts = []
        for run in range(8 // bits):
            part = node
            if run:
                part = call(aten.bitwise_right_shift.Tensor_Scalar, (part, run * bits))
            parts.append(call(aten.bitwise_and.Scalar, (part, (1 << bits) - 1)))
        rows = call(aten.cat.default, (parts, -1))
        if codes.shape[1] % len(parts):
            rows = call(aten.slice.Tensor, (rows, -1, 0, codes.shape[1]))
        rows = call(aten._to_copy.default, (rows,), {"dtype": torch.float32})
        rows = call(aten.sub.Scalar, (rows, 1 << (bits - 1)))
    for cast in casts:
        cast.replace_all_uses_with(rows)
        graph.graph.erase_node(cast)
