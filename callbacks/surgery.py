"""Finding the sub-module to quantize inside a LightningModule, and replacing that one attribute."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import fx, nn

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.state import state_of


def find_submodule(root: nn.Module, path: str) -> nn.Module:
    """The sub-module to quantize, at an attribute path.

    Args:
        root: The LightningModule.
        path: Attribute names joined by dots, as `model` or `net.encoder`.

    Returns:
        The sub-module.

    Raises:
        MisconfigurationException: If there is none, with the module's children; or if it is
            quantized already.

    Examples:
        >>> find_submodule(nn.ModuleDict({"model": nn.ReLU()}), "model")
        ReLU()
    """
    known: dict[str, nn.Module] = dict(root.named_modules(remove_duplicate=False))
    if path and path in known:
        _check_float(known[path], path)
        return known[path]
    children = [name for name, _ in root.named_children()]
    listed = ", ".join(repr(name) for name in children) or "none"
    near = f"; closest: {closest(path, [name for name in known if name])}" if path else ""
    raise MisconfigurationException(
        f"{type(root).__name__} has no sub-module {path!r} to quantize{near}. Its children are: "
        f"{listed}. The whole LightningModule cannot be replaced: keep the network in a "
        "sub-module and name it, as in MixedPrecisionCallback(..., module='model')"
    )


def _check_float(module: nn.Module, path: str) -> None:
    try:
        quantized = isinstance(module, fx.GraphModule) and bool(state_of(module).choices)
    except FxmpqError:  # a graph of the user's own
        quantized = False
    if quantized:
        raise MisconfigurationException(
            f"the sub-module {path!r} is a quantized graph already, from another callback or from "
            f"fxmpq.quantize; put the float network back first, as in module.{path} = "
            "callback.float_module"
        )


def replace_submodule(root: nn.Module, path: str, replacement: nn.Module) -> None:
    """Set the attribute at a path to another module; nothing else of `root` changes.

    Args:
        root: The LightningModule.
        path: Attribute path of an existing sub-module.
        replacement: What takes its place.

    Examples:
        >>> root = nn.ModuleDict({"model": nn.ReLU()})
        >>> replace_submodule(root, "model", nn.Identity())
        >>> root["model"]
        Identity()
    """
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, replacement)
