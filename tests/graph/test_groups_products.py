from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from fxmpq.errors import PatternError, PrecisionError
from fxmpq.formats import Precision
from fxmpq.graph.asked_products import AskedProducts
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.products import find_products
from fxmpq.graph.state import Group
from fxmpq.graph.trace import trace
from fxmpq.targets.reference import REFERENCE

from .conftest import W4A8, W8A8


class Meets(nn.Module):
    """A product that reads what a linear layer reads, and one on what that layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        return torch.bmm(x @ x.transpose(1, 2), hidden)


def product_groups(
    candidates: Sequence[Precision],
    keep: Mapping[str, Precision] | None = None,
    exclude: Sequence[str] = (),
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, Group]:
    graph = trace(Meets(), torch.randn(2, 3, 4))
    asked = AskedProducts(find_products(graph), ("fused",))
    layers, rules = find_layers(graph).layers, REFERENCE.rules
    found = form_groups(
        graph, layers, rules, candidates, keep or {}, exclude, ties, asked=asked
    ).groups
    return {group.name: group for group in found}


def test_a_product_joins_what_reads_its_operand_and_follows_its_activations() -> None:
    groups = product_groups([Precision(4), W4A8, W8A8])
    assert list(groups) == ["fc", "bmm"]
    assert [member.name for member in groups["fc"].members] == ["fc", "matmul"]
    # Weights alone leave nothing for the product to be at.
    assert groups["fc"].candidates == (W4A8, W8A8)
    assert groups["bmm"].candidates == (Precision(None, 8),)
    assert (groups["bmm"].layers, groups["bmm"].members) == ((), groups["bmm"].products)


def test_products_alone_may_have_widths_of_their_own() -> None:
    groups = product_groups([W8A8, Precision(None, 4), Precision(None, 16), Precision()])
    assert groups["fc"].candidates == (W8A8, Precision())
    names = [str(candidate) for candidate in groups["bmm"].candidates]
    assert names == ["a4", "a8", "a16", "fp32"]


def test_patterns_match_products_and_those_of_fused_attention() -> None:
    groups = product_groups([W8A8], keep={"bmm": Precision(4, 4)}, exclude=["fused"])
    assert groups["bmm"].candidates == (Precision(None, 4),)
    groups = product_groups([W8A8], exclude=["matmul"])
    assert groups["matmul"].candidates == (Precision(),)
    assert [member.name for member in groups["fc"].members] == ["fc"]
    with pytest.raises(PatternError, match="no layer matches 'bmn'; .* 'bmm'"):
        product_groups([W8A8], exclude=["bmn"])


def test_a_tie_joins_layers_and_products() -> None:
    groups = product_groups([W4A8, W8A8], ties=[("fc", "bmm", "fused")])
    assert [member.name for member in groups["fc"].members] == ["fc", "matmul", "bmm"]


def test_a_product_that_nothing_fits_is_an_error() -> None:
    with pytest.raises(PrecisionError, match=r"among w4, w8 runs on layer 'bmm' \(matmul\)"):
        product_groups([Precision(4), Precision(8)], exclude=["matmul"])
