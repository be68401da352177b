"""Units of refinement: shown as they go on, and kept so that an interruption loses one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from fxmpq.errors import FileFormatError
from fxmpq.graph.batches import graph_device
from fxmpq.journal import Journal
from fxmpq.progress import Tracked
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.quantizers.ranges import ActivationRange

_RANGE = "range_"


class Units(Tracked):
    """Runs the units of a refinement, or takes them from an interrupted run.

    A unit changes some quantizer modules and returns numbers. With a folder, both are written
    when it is done: the modules' buffers and ranges as `safetensors`, the numbers as a line of a
    journal. A run that resumes loads them instead of computing, and ends with the same bits.
    Files bear the run's digest in their names, so that a journal that was set aside for another
    run keeps its own.

    Args:
        folder: Where units are kept; `None` keeps nothing.
        run: What identifies the run, as plain data; a folder of another run is started anew,
            with a warning that names what differs.
        shown: Whether to show progress bars.

    Raises:
        FileFormatError: If the folder is a file, or its journal is none.

    Examples:
        >>> units = Units()
        >>> [units.unit(name, fx.GraphModule({}, fx.Graph()), (), lambda: [0.5]) for name in "ab"]
        [[0.5], [0.5]]
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        run: Mapping[str, object] | None = None,
        *,
        shown: bool = False,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._journal = None
        self._digest = hashlib.sha256(json.dumps(run or {}).encode()).hexdigest()[:8]
        if self._folder is not None:
            if self._folder.exists() and not self._folder.is_dir():
                raise FileFormatError(
                    f"finished layers are kept in a folder, but {self._folder} is a file; name a "
                    "folder that is not there yet, or one that an interrupted run left"
                )
            self._journal = Journal(self._folder / "units.journal", run or {})
        super().__init__(shown=shown)
        self._position = 0

    def unit(
        self,
        name: str,
        graph: fx.GraphModule,
        modules: Sequence[str],
        compute: Callable[[], Sequence[float]],
    ) -> list[float]:
        """Do one unit of work, or load what it did.

        Args:
            name: Of the unit; units come in the same order in every run.
            graph: Holds the modules.
            modules: Names of the quantizer modules that the unit may change.
            compute: Does the work and returns its numbers; called only if nothing is kept.

        Returns:
            The numbers.

        Raises:
            FileFormatError: If what was kept of the unit cannot be read.
        """
        position, self._position = self._position, self._position + 1
        if self._journal is None or self._folder is None:
            return [float(number) for number in compute()]
        key = f"{position} {name}"
        file = self._folder / f"unit_{position:04d}_{self._digest}.safetensors"
        if key in self._journal.done and file.exists():
            _restore(graph, modules, file)
            return self._journal.done[key]
        numbers = compute()
        tensors = {
            f"{module}/{leaf}": tensor
            for module in modules
            for leaf, tensor in quantizer_tensors(graph.get_submodule(module)).items()
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(file)
        # Last: a unit without its line is done anew, so that a file cut short is never read.
        self._journal.record(key, numbers)
        return self._journal.done[key]


def quantizer_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All that a quantizer module has found, as tensors on the CPU.

    Args:
        module: A quantizer or a bias correction.

    Returns:
        Its buffers by name; an activation quantizer's ranges as `range_<format>`, `float64`,
        shape `[2]`: scale and zero point.
    """
    if isinstance(module, ActivationQuantizer):
        return {
            f"{_RANGE}{name}": torch.tensor([found.scale, found.zero_point], dtype=torch.float64)
            for name, found in module.ranges.items()
        }
    return {
        name: buffer.detach().cpu().contiguous().clone() for name, buffer in module.named_buffers()
    }


def set_quantizer_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Give a quantizer module what `quantizer_tensors` returned.

    Args:
        module: Of the same kind; changed in place.
        tensors: From `quantizer_tensors`.
        device: Where its buffers belong.
    """
    if isinstance(module, ActivationQuantizer):
        for name, found in tensors.items():
            scale, zero_point = found.tolist()
            key = name.removeprefix(_RANGE)
            module.ranges[key] = ActivationRange(float(scale), int(zero_point))
        return
    for name in [name for name, _ in module.named_buffers() if name not in tensors]:
        module.register_buffer(name, None)
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.to(device))


def _restore(graph: fx.GraphModule, modules: Sequence[str], file: Path) -> None:
    """Give modules what a file holds of them; one of which it holds nothing had nothing left."""
    try:
        by_module: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
        for name, tensor in load_file(file).items():
            module, _, leaf = name.rpartition("/")
            by_module.setdefault(module, {})[leaf] = tensor
        for module, found in by_module.items():
            set_quantizer_tensors(graph.get_submodule(module), found, graph_device(graph))
    except (OSError, SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise FileFormatError(
            f"{file} does not hold what an interrupted run had finished: {error}. Delete it, and "
            "that unit is done anew"
        ) from error
