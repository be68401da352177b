"""A graph's modules: its tensors by their names, and its quantizers, of three known classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from fxmpq.artefact import build
from fxmpq.errors import FileFormatError
from fxmpq.formats import NumberFormat
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.storage.fields import decode, encode
from fxmpq.storage.names import qualified
from fxmpq.storage.tensors import TensorReader, TensorWriter

_BARE = frozenset(vars(nn.Module()))
_ROLE_KEYS = frozenset({"role", "requires_grad", "persistent"})
_FORMATS = tuple[NumberFormat, ...]
_ACTIVE = NumberFormat | None


@dataclass(frozen=True)
class _Kind:
    """What a class of quantizers holds besides tensors.

    Args:
        module: The class.
        arguments: Its constructor's, with their types.
        attributes: What is set later, with the types.
        absent: What older files lack, with the value it had then.
    """

    module: type[nn.Module]
    arguments: Mapping[str, object]
    attributes: Mapping[str, object]
    absent: Mapping[str, object] = field(default_factory=dict)


_KINDS: Mapping[str, _Kind] = {
    kind.module.__name__: kind
    for kind in (
        _Kind(
            ActivationQuantizer,
            {"name": str, "formats": _FORMATS, "is_symmetric": bool, "is_output": bool},
            {"ranges": dict[str, ActivationRange], "active": _ACTIVE},
            {"is_symmetric": False, "is_output": False},
        ),
        _Kind(
            WeightQuantizer, {"name": str, "formats": _FORMATS, "axis": int}, {"active": _ACTIVE}
        ),
        _Kind(BiasCorrection, {"name": str}, {"active": _ACTIVE}),
    )
}


def encode_quantizers(graph: fx.GraphModule) -> dict[str, object]:
    """Write the modules that a graph calls: class, formats, ranges and the active format.

    Raises:
        FileFormatError: If one is no quantizer of `fxmpq.prepare`.
    """
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    return {
        name: _encode_quantizer(name, module)
        for name, module in graph.named_modules()
        if name in called
    }


def _encode_quantizer(name: str, module: nn.Module) -> dict[str, object]:
    kind = _KINDS.get(type(module).__name__)
    if kind is None or type(module) is not kind.module:
        raise FileFormatError(
            f"the graph calls {name!r}, a {type(module).__name__}; a stored graph calls only the "
            f"quantizers of fxmpq.prepare: {', '.join(_KINDS)}. Save it before fxmpq.convert"
        )
    held = set(vars(module)) - _BARE
    assert held == {*kind.arguments, *kind.attributes}, f"{held} of {kind} are to be stored"
    content = {key: encode(getattr(module, key)) for key in (*kind.arguments, *kind.attributes)}
    return {"class": kind.module.__name__, **content}


def decode_quantizers(found: object) -> dict[str, nn.Module]:
    """Read quantizers back, without their tensors.

    Raises:
        FileFormatError: If a class is unknown or an attribute does not fit.
    """
    if not isinstance(found, dict):
        raise FileFormatError(f"quantizers are names and what they hold; found {found!r}")
    return {
        qualified(name, "a quantizer"): _decode_quantizer(name, entry)
        for name, entry in found.items()
    }


def _decode_quantizer(name: str, found: object) -> nn.Module:
    kind = _KINDS.get(str(found.get("class"))) if isinstance(found, dict) else None
    if kind is None or not isinstance(found, dict):
        raise FileFormatError(f"{name!r} is no quantizer; known are {', '.join(_KINDS)}")
    types = {**kind.arguments, **kind.attributes}
    found = {**kind.absent, **found}
    if set(found) != {"class", *types}:
        raise FileFormatError(f"{name!r} has {sorted(found)}; expected class, {', '.join(types)}")
    values = {key: decode(types[key], found[key], f"{name}.{key}") for key in types}
    module = build(name, kind.module, {key: values[key] for key in kind.arguments})
    for key in kind.attributes:
        setattr(module, key, values[key])
    return module


def encode_tensors(graph: fx.GraphModule, writer: TensorWriter) -> dict[str, object]:
    """Write a graph's parameters, buffers and constants by name, tied ones once.

    Raises:
        FileFormatError: If a node reads an attribute that is no tensor.
    """
    persistent = frozenset(graph.state_dict(keep_vars=True))
    return {
        name: {**writer.add(f"graph/{name}", tensor), **_role(graph, name, tensor, persistent)}
        for name, tensor in _tensors(graph)
    }


def _tensors(graph: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Module by module, so that a graph that is made in this order has them in this order."""
    names: list[str] = []
    for prefix, module in graph.named_modules(remove_duplicate=False):
        for tensors in (module.named_parameters, module.named_buffers):
            names += [name for name, _ in tensors(prefix, recurse=False, remove_duplicate=False)]
    names += [str(node.target) for node in graph.graph.find_nodes(op="get_attr")]
    for name in dict.fromkeys(names):
        owner, _, leaf = qualified(name, "a tensor").rpartition(".")
        value = getattr(graph.get_submodule(owner), leaf)
        if type(value) not in (Tensor, nn.Parameter):
            raise FileFormatError(
                f"{name!r} is a {type(value).__name__}; a stored graph reads only plain tensors. "
                "Control flow (torch.cond and the like) cannot be stored"
            )
        yield name, value


def _role(
    graph: fx.GraphModule, name: str, tensor: Tensor, persistent: frozenset[str]
) -> dict[str, object]:
    owner, _, leaf = name.rpartition(".")
    if isinstance(tensor, nn.Parameter):
        return {"role": "parameter", "requires_grad": tensor.requires_grad}
    if leaf not in graph.get_submodule(owner)._buffers:
        return {"role": "constant"}
    return {"role": "buffer", "persistent": name in persistent}


def attach(
    root: nn.Module, quantizers: Mapping[str, nn.Module], found: object, reader: TensorReader
) -> None:
    """Add quantizers and register tensors, making the modules on the way, in their old order.

    Args:
        root: Changed in place.
        quantizers: By name.
        found: Tensors as `encode_tensors` gives them.
        reader: Of the file.

    Raises:
        FileFormatError: If a name, role or tensor does not fit.
    """
    if not isinstance(found, dict):
        raise FileFormatError(f"tensors are names and entries; found {str(found)[:80]!r}")
    owners = [qualified(name, "a tensor").rpartition(".")[0] for name in found]
    for owner in dict.fromkeys(owners):
        if owner not in quantizers:
            make_module(root, owner)
    for name, quantizer in quantizers.items():
        owner, _, leaf = name.rpartition(".")
        parent = make_module(root, owner)
        if hasattr(parent, leaf):
            raise FileFormatError(f"there are two modules named {name!r}")
        parent.add_module(leaf, quantizer)
    _attach_tensors(root, found, reader)


def _attach_tensors(root: nn.Module, found: Mapping[str, object], reader: TensorReader) -> None:
    parameters: dict[str, nn.Parameter] = {}
    for name, entry in found.items():
        owner_name, _, leaf = name.rpartition(".")
        if not isinstance(entry, dict):
            raise FileFormatError(f"{name!r} must be an object; found {entry!r}")
        owner = make_module(root, owner_name)
        if hasattr(owner, leaf):
            raise FileFormatError(f"there are two things named {name!r}")
        role, flag = entry.get("role"), _flag(name, entry)
        tensor = reader.tensor({key: entry[key] for key in entry if key not in _ROLE_KEYS})
        if role == "parameter":
            if flag and not (tensor.is_floating_point() or tensor.is_complex()):
                raise FileFormatError(f"{name!r} is {tensor.dtype}, which has no gradients")
            parameter = nn.Parameter(tensor, requires_grad=flag)
            owner.register_parameter(leaf, parameters.setdefault(str(entry["key"]), parameter))
        elif role == "buffer":
            owner.register_buffer(leaf, tensor, persistent=flag)
        elif role == "constant":
            setattr(owner, leaf, tensor)
        else:
            raise FileFormatError(f"{name!r} must be a parameter, buffer or constant; not {role!r}")


def _flag(name: str, entry: dict[str, object]) -> bool:
    """`requires_grad` of a parameter or `persistent` of a buffer."""
    flags = [entry[key] for key in ("requires_grad", "persistent") if key in entry]
    if len(flags) > 1 or not all(isinstance(flag, bool) for flag in flags):
        raise FileFormatError(f"{name!r} has the flags {flags}; expected one, true or false")
    return bool(flags and flags[0])


def make_module(root: nn.Module, name: str) -> nn.Module:
    """The module of a path, made where it is missing.

    Raises:
        FileFormatError: If a part of the path is a tensor.
    """
    owner = root
    for part in name.split(".") if name else []:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        child = getattr(owner, part)
        if not isinstance(child, nn.Module):
            raise FileFormatError(f"{name!r} is both a tensor and a module")
        owner = child
    return owner
