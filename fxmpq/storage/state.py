"""The state of a graph as JSON and back, checked against the graph that it belongs to."""

from __future__ import annotations

from torch import Tensor, fx

from fxmpq.errors import FileFormatError, FxmpqError
from fxmpq.graph.legality.stages import check_stage, stage_of
from fxmpq.graph.state import GraphState
from fxmpq.storage.fields import decode_fields, encode_fields
from fxmpq.storage.tensors import TensorReader, TensorWriter
from fxmpq.storage.trees import decode_tree, encode_tree
from fxmpq.storage.values import Surroundings, decode_value, encode_value

_CALL, _EXAMPLE = "call_spec", "example"


def encode_state(state: GraphState, writer: TensorWriter) -> dict[str, object]:
    """Write a state; its example's tensors go to the file of tensors.

    Raises:
        FileFormatError: If a field holds what cannot be stored.
    """
    example = [
        {"tensor": writer.add(f"example/{index}", leaf)}
        if isinstance(leaf, Tensor)
        else {"value": encode_value(leaf)}
        for index, leaf in enumerate(state.example)
    ]
    fields = encode_fields(state, leave=(_CALL, _EXAMPLE))
    return {_CALL: encode_tree(state.call_spec), _EXAMPLE: example, **fields}


def decode_state(found: object, reader: TensorReader) -> GraphState:
    """Read a state back.

    Raises:
        FileFormatError: If a field is missing, unknown or of another type.
    """
    if not isinstance(found, dict) or not isinstance(found.get(_EXAMPLE), list):
        raise FileFormatError(f"a state has {_CALL} and {_EXAMPLE}; found {str(found)[:80]!r}")
    others = {
        _CALL: decode_tree(found.get(_CALL)),
        _EXAMPLE: tuple(_decode_leaf(leaf, reader) for leaf in found[_EXAMPLE]),
    }
    fields = {name: entry for name, entry in found.items() if name not in others}
    return decode_fields(GraphState, fields, "state", others)


def _decode_leaf(found: object, reader: TensorReader) -> object:
    if isinstance(found, dict) and set(found) == {"tensor"}:
        return reader.tensor(found["tensor"]).cpu()
    if isinstance(found, dict) and set(found) == {"value"}:
        return decode_value(found["value"], Surroundings())
    raise FileFormatError(f"an input is a tensor or a value; found {str(found)[:80]!r}")


def check_state(graph: fx.GraphModule, state: GraphState) -> None:
    """Check that a graph is legal at its stage, and has all that its state names.

    Raises:
        FileFormatError: Naming what is missing or does not fit.
    """
    try:
        check_stage(graph, stage_of(state), state)
    except (AttributeError, FxmpqError, RuntimeError) as error:
        raise FileFormatError(f"the stored graph is not legal: {error}") from error
