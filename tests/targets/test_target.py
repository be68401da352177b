from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.target import Converted, LayerReport, agreement_db


@given(st.floats(1e-6, 1e3), st.integers(0, 100))
def test_agreement_is_the_signal_to_noise_ratio(noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(7, 3, generator=generator)
    z = y + noise * torch.randn(7, 3, generator=generator)
    difference = (z.double() - y.double()).square().sum()
    expected = 10 * math.log10(float(y.double().square().sum() / difference))
    assert agreement_db([y], [z]) == pytest.approx(expected, abs=1e-9)


def test_outputs_are_weighed_together_and_integers_left_out() -> None:
    one, other = torch.tensor([3.0]), torch.tensor([4.0])
    labels, wrong = torch.tensor([1]), torch.tensor([2])
    found = agreement_db([one, labels, other], [torch.tensor([3.5]), wrong, other])
    assert found == pytest.approx(10 * math.log10(25 / 0.25))


def test_equal_outputs_agree_without_bound() -> None:
    assert agreement_db([torch.ones(2)], [torch.ones(2)]) == math.inf


def test_nan_is_no_agreement() -> None:
    assert not agreement_db([torch.ones(2)], [torch.tensor([1.0, math.nan])]) >= 0


def test_outputs_that_are_missing_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        agreement_db([torch.ones(2), torch.ones(2)], [torch.ones(2)])


def test_the_report_is_plain_rows() -> None:
    layers = (LayerReport("fc", "w4a8", "MatMul"), LayerReport("head", "fp32", "float", "asked"))
    rows = Converted("chip", lambda batch: [], None, (), layers).report()
    assert rows == [
        {"layer": "fc", "asked": "w4a8", "kernel": "MatMul", "reason": ""},
        {"layer": "head", "asked": "fp32", "kernel": "float", "reason": "asked"},
    ]
    rows[0]["layer"] = "changed"
    assert layers[0].layer == "fc"


@pytest.mark.parametrize("target", [REFERENCE, ONNXRUNTIME])
def test_a_target_runs_its_own_candidates(target: object) -> None:
    rules = target.rules  # type: ignore[attr-defined]
    assert target.name == rules.name  # type: ignore[attr-defined]
    rules.check(rules.default_candidates)
    for kind in ("conv", "linear"):
        assert len(rules.candidates_for(kind, rules.default_candidates)) == len(
            rules.default_candidates
        )
