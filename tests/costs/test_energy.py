from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import fxmpq
from fxmpq.costs.energy import energy, energy_figures
from fxmpq.costs.weights import weight_bytes
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import state_of
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE

WIDTHS = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16])


def per_mac(name: str) -> float:
    return energy_figures([Precision.parse(name)]).general.per_mac[name]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("w8a8", 0.2 + 0.1),
        ("fp32", 3.7 + 0.9),
        # Weights that are widened to float save nothing in arithmetic.
        ("w4", 3.7 + 0.9),
        ("w4b32", 3.7 + 0.9),
        # Assumed: in proportion to the widths.
        ("w4a8", 0.1 + 0.1),
        ("w2a2", 0.0125 + 0.1),
        ("a4", 0.05 + 0.1),
        # Assumed: as 16-bit floats.
        ("we4m3ae4m3", 1.1 + 0.9),
        ("we2m1b32a8", 1.1 + 0.9),
    ],
)
def test_figures_of_a_multiply_accumulate(name: str, published: float) -> None:
    assert per_mac(name) == pytest.approx(published)


@given(WIDTHS, WIDTHS)
def test_fewer_bits_never_take_more(weight: int, activation: int) -> None:
    found = per_mac(f"w{weight}a{activation}")
    assert 0.1 < found <= per_mac("w16a16") < per_mac("fp32")
    # What is published of 32 bits (3.1) is what the assumption gives there, to 4 %.
    multiply = (found - 0.1) * 32 * 32 / (weight * activation)
    assert multiply == pytest.approx(3.1, rel=0.04)


def test_groups_cost_their_arithmetic_and_their_weights(conv_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    found = energy(prepared)
    assert found.rows is not None
    total = 0.0
    for group in state_of(prepared).groups:
        macs = sum(layer.macs for layer in group.layers)
        for candidate in group.candidates:
            bits = candidate.weight_bits * candidate.activation_bits
            expected = macs * (0.2 * bits / 64 + 0.1) + weight_bytes(group, candidate) * 162.5
            assert found.rows[group.name][str(candidate)] == pytest.approx(expected)
        total += macs * 4.6 + weight_bytes(group, Precision()) * 162.5
    assert found.float_total == pytest.approx(total)
    assert found.fixed == 0


def test_attention_is_a_fixed_part_and_embeddings_are_not_read(bert_graph: fx.GraphModule) -> None:
    found = energy(insert_quantizers(bert_graph, ONNXRUNTIME.rules))
    assert found.fixed == pytest.approx(2 * (2 * 8 * 8 * 16) * 4.6)
    assert found.rows is not None
    look_ups = {name: row for name, row in found.rows.items() if "embeddings" in name}
    assert len(look_ups) == 3
    assert all(set(row.values()) == {0} for row in look_ups.values())


def test_it_is_a_limit_and_what_is_minimised(
    conv_net: nn.Module, images: list[torch.Tensor]
) -> None:
    options = {"target": "reference", "candidates": ["w2a8", "w4a8", "w8a8"], "progress": False}
    plan = fxmpq.quantize(conv_net, images, budget="energy=16%", **options).plan
    assert plan.relative["energy"] <= 0.16
    assert len(set(plan.choices.values())) > 1
    least = fxmpq.quantize(conv_net, images, budget="minimize=energy,sqnr=15", **options).plan
    assert least.relative["energy"] < 0.27


def test_an_unprepared_graph_is_an_error(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        energy(conv_graph)
