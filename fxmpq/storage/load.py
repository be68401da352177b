"""Load: a saved graph, without the model's class and without executing what the files say."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx, nn

from fxmpq.artefact import check_fields, load_json
from fxmpq.errors import FileFormatError
from fxmpq.graph.debug import checked
from fxmpq.graph.quantizable import QuantizableGraph
from fxmpq.graph.state import with_state
from fxmpq.storage.calls import decode_call
from fxmpq.storage.modules import attach, decode_quantizers
from fxmpq.storage.save import FILE, SCHEMA, VERSION
from fxmpq.storage.state import check_state, decode_state
from fxmpq.storage.tensors import TensorReader

_FIELDS = frozenset({"call", "nodes", "sizes", "quantizers", "tensors", "state", "tensor_file"})


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> fx.GraphModule:
    """Load a graph that `save` wrote; it goes on where it was saved.

    The graph computes bit for bit what it did, is called like the model and returns what the
    model returned, at any batch size that was free. The model's class is not needed. Output
    classes are found among those of transformers and those registered with
    `torch.utils._pytree`; where one is not found, a warning names it and a plain `dict` or
    `tuple` takes its place.

    Nothing that the files say is executed: nodes call pure ATen operators and a table of
    Python's functions on numbers, modules are fxmpq's three quantizers, and every name that
    torch.fx writes into the code it compiles is checked.

    Args:
        folder: As given to `save`.
        device: Where to put the graph, wherever it was saved.

    Returns:
        The graph, in eval mode.

    Raises:
        FileFormatError: If a file is missing, damaged, of another version or not legal.

    Examples:
        >>> load("nowhere")
        Traceback (most recent call last):
        fxmpq.errors.FileFormatError: 'nowhere' holds no saved graph: there is no graph.json...
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise FileFormatError(
            f"{str(folder)!r} holds no saved graph: there is no {FILE}; pass the folder that was "
            "given to fxmpq.save"
        )
    found = load_json(SCHEMA, VERSION, folder / FILE)
    check_fields(SCHEMA, found, set(_FIELDS), set())
    place = torch.device(device)
    reader = TensorReader(folder, found["tensor_file"], place)
    try:
        return _restore(found, reader, place)
    except RecursionError as error:
        raise FileFormatError(f"{str(folder / FILE)!r} is nested too deeply") from error


def _restore(
    found: dict[str, object], reader: TensorReader, device: torch.device
) -> fx.GraphModule:
    # SymPy takes as long to import as all the rest of fxmpq.
    from fxmpq.storage.nodes import decode_nodes
    from fxmpq.storage.sizes import SizeReader

    nodes = decode_nodes(found["nodes"], SizeReader(found["sizes"]), device)
    nodes.set_codegen(decode_call(found["call"], len(nodes.find_nodes(op="placeholder"))))
    graph = QuantizableGraph(nn.Module(), fx.Graph(), "QuantizableGraph")
    attach(graph, decode_quantizers(found["quantizers"]), found["tensors"], reader)
    graph.graph = nodes
    state = decode_state(found["state"], reader)
    check_state(graph, state)
    return checked(with_state(graph.eval(), state), "load")
