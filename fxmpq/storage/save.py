"""Save: a graph at any stage, as a folder of JSON and safetensors."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from fxmpq.artefact import dump_json
from fxmpq.graph.state import state_of
from fxmpq.storage.calls import encode_call
from fxmpq.storage.modules import encode_quantizers, encode_tensors
from fxmpq.storage.state import encode_state
from fxmpq.storage.tensors import TensorWriter, remove_others

SCHEMA = "fxmpq.graph"
VERSION = 1
FILE = "graph.json"


def save(graph: fx.GraphModule, folder: str | Path) -> Path:
    """Save a graph at any stage: traced, prepared, calibrated, planned or refined.

    Two files are written: `graph.json` (nodes, groups, quantizers, how it is called) and
    `tensors-<digest>.safetensors` (each tensor once, on whatever device it was). Neither holds
    code. Saving over an earlier graph replaces it in one move: until then the folder holds the
    old one whole, even if the save is interrupted. Other files in the folder are left alone.

    Args:
        graph: From `trace` or any later step before `convert`; not changed.
        folder: Made if missing.

    Returns:
        The folder.

    Raises:
        FxmpqError: If it is no graph of fxmpq's.
        FileFormatError: If it calls what cannot be stored (an operator that is not ATen's,
            control flow, a module other than fxmpq's quantizers), naming the node.
        OSError: If the folder cannot be written.

    Examples:
        >>> import tempfile, torch
        >>> from fxmpq import load, trace
        >>> batch = torch.randn(2, 3)
        >>> graph = trace(torch.nn.Linear(3, 4).eval(), batch)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loaded = load(save(graph, folder))
        >>> torch.equal(loaded(batch), graph(batch))
        True
    """
    # SymPy takes as long to import as all the rest of fxmpq.
    from fxmpq.storage.nodes import encode_nodes
    from fxmpq.storage.sizes import SizeWriter

    state = state_of(graph)
    sizes, tensors = SizeWriter(), TensorWriter()
    fields = {
        "call": encode_call(graph.graph),
        "nodes": encode_nodes(graph.graph, sizes),
        "sizes": sizes.ranges,
        "quantizers": encode_quantizers(graph),
        "tensors": encode_tensors(graph, tensors),
        "state": encode_state(state, tensors),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_file = tensors.write(folder)
    dump_json(SCHEMA, VERSION, {"tensor_file": tensor_file, **fields}, folder / FILE)
    remove_others(folder, tensor_file)
    return folder
