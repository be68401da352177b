"""The call of a graph: argument names and the trees of its inputs and outputs."""

from __future__ import annotations

from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from fxmpq.artefact import check_fields
from fxmpq.errors import FileFormatError
from fxmpq.graph.call_structure import CallStructure
from fxmpq.storage.names import identifier
from fxmpq.storage.trees import decode_tree, encode_tree

_CALL = "a stored call"
_FIELDS = frozenset({"arguments", "inputs", "outputs"})


def encode_call(graph: fx.Graph) -> dict[str, object]:
    """Write how a graph is called and what it returns.

    Raises:
        FileFormatError: If the graph has no such structure, or a name or class cannot be stored.
    """
    structure = graph._codegen
    found = structure.pytree_info if isinstance(structure, _PyTreeCodeGen) else None
    if found is None or found.out_spec is None:
        raise FileFormatError("the graph does not say how it is called; use that of fxmpq.trace")
    return {
        "arguments": [identifier(name, "an argument") for name in found.orig_args],
        "inputs": encode_tree(found.in_spec),
        "outputs": encode_tree(found.out_spec),
    }


def decode_call(found: object, placeholders: int) -> CallStructure:
    """Read a call back; torch.fx writes its names into code, so each must be an identifier.

    Args:
        found: As `encode_call` gives it.
        placeholders: How many the graph has.

    Raises:
        FileFormatError: If names, trees and placeholders do not fit each other.
    """
    if not isinstance(found, dict):
        raise FileFormatError(f"{_CALL} is an object; found {str(found)[:80]!r}")
    check_fields(_CALL, found, set(_FIELDS), set())
    names = found["arguments"]
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        raise FileFormatError(f"arguments are a list of different names; found {names!r}")
    inputs, outputs = decode_tree(found["inputs"]), decode_tree(found["outputs"])
    is_call = inputs.type is tuple and inputs.num_children == 2
    kinds = (tuple, dict)
    if not is_call or any(inputs.child(at).type is not kind for at, kind in enumerate(kinds)):
        raise FileFormatError("a call is a tuple of arguments and a dict of keyword arguments")
    keywords = inputs.child(1).context
    for name in (*names, *keywords):
        if identifier(name, "an argument").startswith("__") or name == "self":
            raise FileFormatError(f"an argument cannot be named {name!r}")
    taken = inputs.child(0).num_children + len(keywords)
    if taken != len(names) or inputs.num_leaves != placeholders:
        raise FileFormatError(
            f"{len(names)} arguments and {placeholders} placeholders do not fit a call of {taken} "
            f"arguments with {inputs.num_leaves} values"
        )
    return CallStructure(_PyTreeInfo(list(names), inputs, outputs))
