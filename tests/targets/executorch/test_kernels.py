from __future__ import annotations

import pytest

from fxmpq.formats import Precision
from fxmpq.graph.state import Layer
from fxmpq.targets.executorch.kernels import Kernels
from fxmpq.targets.executorch.places import Place

EXECUTED = [
    ["Convolution (NHWC, QC8) IGEMM", "Fully Connected (NC, F32) GEMM"],
    ["Fully Connected (NC, QS8, QC8W) GEMM"],
    ["Fully Connected (NC, F32, QC4W) GEMM", "Fully Connected (NC, QDU8, F32, QB4W) GEMM"],
]
PLACES = {
    "codes_a": [Place("aten.convolution", 0, 0)],
    "shared": [Place("aten.linear", 0, 1), Place("aten.linear", 1, 0)],
    "codes_t": [Place("aten.embedding")],
    "codes_p": [Place("aten.linear")],
    "beyond": [Place("aten.linear", 1, 5)],
    "codes_s": [Place("aten.linear", 2, 0)],
    "codes_r": [Place("aten.linear", 2, 1)],
}
NAMES = {
    "a": "codes_a",
    "one": "shared",
    "other": "shared",
    "third": "shared",
    "table": "codes_t",
    "portable": "codes_p",
    "beyond": "beyond",
    "stored": "codes_s",
    "rows": "codes_r",
}


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(PLACES, EXECUTED, NAMES)


def layer(name: str, kind: str = "linear") -> Layer:
    return Layer(name, kind, name, f"{name}.weight", 0, (4, 4), 0)


def test_float_layers(kernels: Kernels) -> None:
    found = [kernels.of_float(layer(name)) for name in ("a", "one", "table", "third", "nowhere")]
    expected = [*EXECUTED[0], "portable aten.embedding", "float", "float"]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "precision", "kernel", "reason"),
    [
        ("a", "w8a8", EXECUTED[0][0], ""),
        ("one", "w8a8", EXECUTED[0][1], "XNNPACK has no kernel from codes"),
        ("other", "w8a8", EXECUTED[1][0], ""),
        ("other", "w4a8", EXECUTED[1][0], "stored in 8 bits: XNNPACK takes 4-bit"),
        ("stored", "w4", EXECUTED[2][0], ""),
        ("stored", "w4a8", EXECUTED[2][0], "XNNPACK has no kernel from codes"),
        ("rows", "w4b32a8dt", EXECUTED[2][1], ""),
        ("portable", "w8a8", "portable aten.linear", "XNNPACK has no kernel for it"),
        ("beyond", "w8a8", "unknown", "the program that was written does not show it"),
        ("third", "w8a8", "unknown", "the program that was written does not show it"),
    ],
)
def test_quantized_layers(
    kernels: Kernels, name: str, precision: str, kernel: str, reason: str
) -> None:
    found, why = kernels.of_quantized(layer(name), Precision.parse(precision))
    assert found == kernel
    assert why.startswith(reason)
    assert bool(why) == bool(reason)


def test_embeddings_look_up_codes(kernels: Kernels) -> None:
    found = kernels.of_quantized(layer("table", "embedding"), Precision.parse("w4"))
    assert found == ("portable aten.embedding on stored codes", "")
