from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.graph.state import Group, Layer
from fxmpq.sensitivity.indicators import indicator_scores

W, A = NumberFormat, lambda bits: NumberFormat(bits, Scheme.AFFINE)


def group(name: str, *weights: str, candidates: tuple[str, ...]) -> Group:
    layers = tuple(
        Layer(f"{name}{i}", "linear", f"n{i}", "w", 1, (1,), 0, weight_quantizer=weight)
        for i, weight in enumerate(weights)
    )
    parsed = tuple(Precision.parse(entry) for entry in candidates)
    return Group(name, layers, parsed, (f"{name}.in",))


def test_a_score_adds_activations_and_weights_of_each_width() -> None:
    pair = group("pair", "w1", "w2", candidates=("w2", "w2a4", "w2a8", "w4a8", "fp32"))
    steps = {
        "pair.in": {A(8): 0.01, A(4): 0.25},
        "w1": {W(4): 0.5, W(2): 1.0},
        "w2": {W(2): 3.0, W(4): 0.125},
    }
    found = indicator_scores([pair], steps, alpha=10.0, guard="monotone")
    assert found == {
        "pair": pytest.approx(
            {"w2": 40, "w2a4": 40.25, "w2a8": 40.01, "w4a8": 6.25 + 0.01, "fp32": 0}
        )
    }
    assert indicator_scores([pair], steps, alpha=10.0, guard="forbid") == found
    halved = indicator_scores([pair], steps, alpha=0.0, guard="monotone")["pair"]
    assert halved["w2a4"] == 0.25


def test_a_step_that_shrinks_with_the_bits_is_raised_or_forbidden() -> None:
    names = ("w2a8", "w3a8", "w4a8", "w8a8")
    one, other = (group(name, name, candidates=names) for name in ("one", "other"))
    widths = dict(zip((2, 3, 4, 8), (W(b) for b in (2, 3, 4, 8)), strict=True))
    steps = {
        "one.in": {A(8): 1.0},
        "one": {widths[8]: 2.0, widths[4]: 0.5, widths[3]: 0.25, widths[2]: 4.0},
        "other.in": {A(8): 0.0},
        "other": {widths[8]: 1.0, widths[4]: 2.0, widths[3]: 2.0, widths[2]: 3.0},
    }
    found = indicator_scores([one, other], steps, alpha=1.0, guard="monotone")
    assert found["one"] == {"w2a8": 5.0, "w3a8": 3.0, "w4a8": 3.0, "w8a8": 3.0}
    assert found["other"] == {"w2a8": 3.0, "w3a8": 2.0, "w4a8": 2.0, "w8a8": 1.0}
    refused = indicator_scores([one, other], steps, alpha=1.0, guard="forbid")
    assert refused["other"] == found["other"]
    assert {refused["one"][name] for name in ("w2a8", "w8a8")} == {5.0, 3.0}
    assert refused["one"]["w3a8"] == refused["one"]["w4a8"] == 2 * (5 + 3 + 3 + 2 + 2 + 1)
    steps["one"][widths[3]] = 0.75
    raw = indicator_scores([one, other], steps, alpha=1.0, guard="forbid")["one"]
    assert raw["w3a8"] == 1.75  # more than 4 bits, which are forbidden, and less than 8
    assert raw["w4a8"] > 20


rows = st.lists(st.floats(1e-5, 100.0), min_size=4, max_size=4)


@given(rows, rows, rows, rows)
def test_guards_leave_scores_finite_and_ordered(
    one_w: list[float], one_a: list[float], other_w: list[float], other_a: list[float]
) -> None:
    bits = (8, 4, 3, 2)
    names = tuple(f"w{w}a{a}" for w in bits for a in bits)
    groups = [group("one", "one", candidates=names), group("other", "other", candidates=names)]
    steps = {
        "one": {W(b): s for b, s in zip(bits, one_w, strict=True)},
        "one.in": {A(b): s for b, s in zip(bits, one_a, strict=True)},
        "other": {W(b): s for b, s in zip(bits, other_w, strict=True)},
        "other.in": {A(b): s for b, s in zip(bits, other_a, strict=True)},
    }
    monotone = indicator_scores(groups, steps, alpha=2.0, guard="monotone")
    for row in monotone.values():
        for w, a in ((w, a) for w in bits for a in bits):
            for wider in bits:
                assert row[f"w{w}a{a}"] >= row[f"w{max(w, wider)}a{a}"]
                assert row[f"w{w}a{a}"] >= row[f"w{w}a{max(a, wider)}"]
    forbidden = indicator_scores(groups, steps, alpha=2.0, guard="forbid")
    legal: list[float] = []
    refused: list[float] = []
    for name, row in forbidden.items():
        for entry, value in row.items():
            precision = Precision.parse(entry)
            falls = any(
                width < 8
                and steps[key][kind(width)] < steps[key][kind(bits[bits.index(width) - 1])]
                for key, kind, width in (
                    (name, W, precision.weight_bits),
                    (f"{name}.in", A, precision.activation_bits),
                )
            )
            (refused if falls else legal).append(value)
            weight = steps[name][W(precision.weight_bits)]
            activation = steps[f"{name}.in"][A(precision.activation_bits)]
            assert falls or value == activation + 2 * weight
    assert all(math.isfinite(value) for value in legal + refused)
    assert all(value > sum(legal) for value in refused)
    assert len(set(refused)) <= 1


def test_a_forbidden_entry_costs_something_even_where_nothing_else_does() -> None:
    one = group("one", "one", candidates=("w4", "w8"))
    steps = {"one": {W(4): 0.5, W(8): 1.0}}
    found = indicator_scores([one], steps, alpha=0.0, guard="forbid")
    assert found == {"one": {"w4": 1.0, "w8": 0.0}}
