from __future__ import annotations

from dataclasses import replace

import pytest

from fxmpq.graph.findings import Fusion, Join, Missed
from fxmpq.storage.fields import decode, encode

FINDINGS = (
    Fusion("conv-relu", ("conv2d", "relu"), "stem"),
    Fusion("add-relu", ("add", "relu_1")),
    Join("added", "conv2", "downsample"),
    Missed("conv-relu", "conv2", "its output is the model's"),
)


@pytest.mark.parametrize("finding", FINDINGS)
def test_findings_are_stored_and_compared_by_value(finding: object) -> None:
    again = decode(type(finding), encode(finding), "finding")
    assert again == finding
    assert hash(again) == hash(finding)


def test_a_fusion_may_begin_without_a_layer() -> None:
    assert FINDINGS[1].layer == ""  # type: ignore[union-attr]  # it is the second fusion
    assert replace(FINDINGS[0], layer="") != FINDINGS[0]
