"""Trees: how a call's arguments and a model's outputs are nested, as JSON and back."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple, cast

from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from fxmpq.errors import FileFormatError
from fxmpq.storage.values import Surroundings, decode_value, encode_value

_LEAF = "*"
_NAMED_TUPLE = "namedtuple"


class _Pair(NamedTuple):
    """Any named tuple: pytree gives them all one type."""

    first: int
    second: int


_ANY_NAMED_TUPLE = pytree.tree_structure(_Pair(0, 0)).type
_PLAIN: Mapping[str, type] = {
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "OrderedDict": OrderedDict,
}
# The only modules that are imported because a file names them.
_OUTPUT_MODULES = re.compile(
    r"transformers\.(modeling_outputs|models\.[a-z0-9_]+\.modeling_[a-z0-9_]+)"
)


def encode_tree(spec: TreeSpec) -> object:
    """Write a tree as plain data.

    Args:
        spec: Of tuples, lists, dicts, named tuples, and classes that are registered with
            `torch.utils._pytree`, as the outputs of transformers are.

    Returns:
        `"*"` for a leaf; else the class's name, its context (keys, fields) and its children.

    Raises:
        FileFormatError: If a class keeps a context that is no plain data.

    Examples:
        >>> encode_tree(pytree.tree_structure({"x": 1}))
        {'type': 'dict', 'context': ['x'], 'children': ['*']}
    """
    if spec.type is None:
        return _LEAF
    children = [encode_tree(spec.child(index)) for index in range(spec.num_children)]
    kind = spec.type
    if kind is _ANY_NAMED_TUPLE:
        named = spec.context
        content = {"class": _class_name(named), "fields": list(named._fields)}
        return {"type": _NAMED_TUPLE, **content, "children": children}
    name = next((name for name, plain in _PLAIN.items() if plain is kind), _class_name(kind))
    return {"type": name, "context": encode_value(spec.context), "children": children}


def decode_tree(found: object) -> TreeSpec:
    """Read a tree back, finding classes by name.

    A class is one of Python's containers, an output class of transformers, or one that is
    registered with `torch.utils._pytree` by now. Of the classes that are not found, those with
    named entries become a `dict` and named tuples a `tuple`, each with a warning.

    Args:
        found: As `encode_tree` gives it.

    Returns:
        The tree.

    Raises:
        FileFormatError: If it is no tree, or a class without named entries is not found.

    Examples:
        >>> spec = pytree.tree_structure((1, [2, 3]))
        >>> decode_tree(encode_tree(spec)) == spec
        True
    """
    if found == _LEAF:
        return pytree.tree_structure(0)
    if not isinstance(found, dict) or not isinstance(found.get("children"), list):
        raise FileFormatError(f"expected a tree with type and children; found {str(found)[:80]!r}")
    children = [decode_tree(child) for child in found["children"]]
    if found.get("type") == _NAMED_TUPLE:
        return _named_tuple(found, children)
    name, context = found.get("type"), decode_value(found.get("context"), Surroundings())
    kind = _find_class(name)
    has_keys = isinstance(context, list) and len(context) == len(children)
    if kind in (dict, OrderedDict) and not has_keys:
        raise FileFormatError(f"{len(children)} entries of a dict have the keys {context!r}")
    if kind is not None:
        return TreeSpec(kind, context, children)
    if has_keys and all(isinstance(key, str) for key in cast("list[object]", context)):
        _warn(str(name), "dict")
        return TreeSpec(dict, context, children)
    raise FileFormatError(
        f"the call or output holds a {name!r}, which is not registered with torch.utils._pytree; "
        "import the module that defines and registers it, then load again"
    )


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _find_class(name: object) -> type | None:
    """A class by name, importing nothing but transformers' own modules of models."""
    if not isinstance(name, str):
        raise FileFormatError(f"a tree's type is a name; found {name!r}")
    if name in _PLAIN:
        return _PLAIN[name]
    module, _, leaf = name.rpartition(".")
    if _OUTPUT_MODULES.fullmatch(module):
        found = _transformers_output(module, leaf)
        if found is not None:
            return found
    return next((kind for kind in pytree.SUPPORTED_NODES if _is_named(kind, name)), None)


def _is_named(kind: object, name: str) -> bool:
    return isinstance(kind, type) and _class_name(kind) == name


def _transformers_output(module: str, leaf: str) -> type | None:
    try:
        from transformers.utils.generic import ModelOutput

        found = vars(importlib.import_module(module)).get(leaf)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, ModelOutput) else None


def _named_tuple(found: Mapping[str, object], children: list[TreeSpec]) -> TreeSpec:
    name, fields = found.get("class"), found.get("fields")
    if not isinstance(name, str) or not isinstance(fields, list) or len(fields) != len(children):
        raise FileFormatError(f"expected a named tuple's class and fields; found {fields!r}")
    module, _, leaf = name.rpartition(".")
    # Only where its module was imported already.
    kind = vars(sys.modules[module]).get(leaf) if module in sys.modules else None
    is_same = isinstance(kind, type) and issubclass(kind, tuple)
    if is_same and list(getattr(kind, "_fields", ())) == fields:
        return TreeSpec(_ANY_NAMED_TUPLE, kind, children)
    _warn(name, "tuple")
    return TreeSpec(tuple, None, children)


def _warn(name: str, instead: str) -> None:
    warnings.warn(
        f"the class {name} is not known here, so the graph takes or returns a {instead} in its "
        "place; to get the class, import its module before fxmpq.load",
        stacklevel=2,
    )
