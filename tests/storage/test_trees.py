from __future__ import annotations

import json
import warnings
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from fxmpq.errors import FileFormatError
from fxmpq.storage import trees
from fxmpq.storage.trees import decode_tree, encode_tree

Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024  (as users write them)


@dataclass
class Detection:
    boxes: Any
    scores: Any


pytree.register_dataclass(Detection)

NESTED = st.recursive(
    st.integers(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(0, 9), inner, max_size=3).map(OrderedDict),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
        st.tuples(inner, inner).map(lambda pair: Detection(*pair)),
        inner.map(lambda found: SequenceClassifierOutput(logits=found)),
    ),
    max_leaves=8,
)


def through_text(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    return decode_tree(json.loads(json.dumps(encode_tree(spec))))


@given(NESTED)
def test_trees_come_back(nested: object) -> None:
    leaves, spec = pytree.tree_flatten(nested)
    found = through_text(spec)
    assert found == spec
    assert pytree.tree_unflatten(leaves, found) == nested


def test_outputs_of_transformers_are_theirs_again() -> None:
    output = BaseModelOutput(last_hidden_state=torch.ones(1), hidden_states=(torch.ones(2),) * 2)
    leaves, spec = pytree.tree_flatten(output)
    found = pytree.tree_unflatten(leaves, through_text(spec))
    assert type(found) is BaseModelOutput
    assert len(found.hidden_states) == 2
    assert found.attentions is None


def test_torch_s_own_results_come_back() -> None:
    spec = pytree.tree_structure(torch.ones(2, 2).max(dim=1))
    assert through_text(spec) == spec


def test_an_output_class_that_is_not_there_becomes_a_dict_with_a_warning() -> None:
    stored = {
        "type": "their_package.models.Scores",
        "context": ["logits", "loss"],
        "children": ["*", "*"],
    }
    with pytest.warns(UserWarning, match="class their_package.models.Scores is not known here"):
        spec = decode_tree(stored)
    assert pytree.tree_unflatten([1, 2], spec) == {"logits": 1, "loss": 2}


def test_a_named_tuple_that_is_not_there_becomes_a_tuple_with_a_warning() -> None:
    fields = {"type": "namedtuple", "fields": ["a", "b"], "children": ["*", "*"]}
    with pytest.warns(UserWarning, match="takes or returns a tuple"):
        spec = decode_tree({**fields, "class": "nowhere.Pair"})
    assert pytree.tree_unflatten([1, 2], spec) == (1, 2)
    with pytest.warns(UserWarning, match="takes or returns a tuple"):
        spec = decode_tree({**fields, "class": f"{__name__}.Pair"})
    assert pytree.tree_unflatten([1, 2], spec) == (1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_tree(encode_tree(pytree.tree_structure(Pair(1, 2)))).context is Pair


def test_a_class_without_named_entries_must_be_there() -> None:
    stored = {"type": "their.Bag", "context": None, "children": ["*"]}
    with pytest.raises(FileFormatError, match="'their.Bag', which is not registered"):
        decode_tree(stored)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "transformers.utils.generic.ModelOutput",
        "transformers.commands.serving.ServeCommand",
        "transformers.modeling_outputs.torch",
        "transformers.modeling_outputs.nothing",
        "transformers.models.nothing.modeling_nothing.Output",
        "transformers.models.bert.modeling_bert.BertModel",
        "transformers.models...os.system",
    ],
)
def test_names_of_other_things_import_and_call_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported: list[str] = []
    real = trees.importlib.import_module

    def record(module: str) -> object:
        imported.append(module)
        return real(module)

    monkeypatch.setattr(trees.importlib, "import_module", record)
    with pytest.raises(FileFormatError, match="not registered"):
        decode_tree({"type": name, "context": None, "children": ["*"]})
    assert all(module.startswith("transformers.model") for module in imported)


def test_without_transformers_its_outputs_are_dicts(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {
        "type": "transformers.models.swin.modeling_swin.Gone",
        "context": ["logits"],
        "children": ["*"],
    }
    with pytest.warns(UserWarning, match="modeling_swin.Gone is not known"):
        assert decode_tree(stored).type is dict


@pytest.mark.parametrize(
    "stored",
    [
        "leaf",
        None,
        3,
        [],
        {"type": "tuple"},
        {"type": "tuple", "children": 3},
        {"type": 3, "context": None, "children": []},
        {"type": "dict", "context": ["a"], "children": []},
        {"type": "dict", "context": None, "children": ["*"]},
        {"type": "namedtuple", "class": "a.B", "fields": ["x"], "children": []},
        {"type": "namedtuple", "class": None, "fields": [], "children": []},
    ],
)
def test_malformed_trees_are_refused(stored: object) -> None:
    with pytest.raises(FileFormatError):
        decode_tree(stored)


def test_a_context_that_is_no_data_is_not_stored() -> None:
    class Holder:
        pass

    pytree.register_pytree_node(Holder, lambda x: ([], object()), lambda x, c: Holder())
    with pytest.raises(FileFormatError, match="cannot be stored"):
        encode_tree(pytree.tree_structure(Holder()))
    bounded = pytree.tree_structure(deque([1], maxlen=3))
    assert through_text(bounded) == bounded
