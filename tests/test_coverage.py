"""The benchmark of architectures on a quick subset, and what it calls a fault."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REFERENCE = ("albert", "t5", "vit", "convnext", "wav2vec2", "qwen2_moe")
BOTH = ("gpt2", "resnet")

Check = Callable[..., Any]


@pytest.fixture(scope="module", name="benchmark")
def load_benchmark() -> Iterator[Callable[[str], Any]]:
    """Imports a module of the benchmarks, which are scripts and in no package."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module", name="check")
def make_check(benchmark: Callable[[str], Any]) -> Check:
    found = benchmark("_architectures").ARCHITECTURES

    def check(name: str, targets: tuple[str, ...]) -> Any:
        return benchmark("_coverage_check").Check(name, found[name], targets).run()

    return check


@pytest.fixture(name="good")
def good_row(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("_coverage_row").Row(
        "net",
        parameters=10,
        batch="any",
        quantizable=8,
        weights=8,
        equals_trace=True,
        off_db=math.inf,
        uniform_db={"w16a16": 70.0, "w8a8": 30.0},
        shares={"reference": 0.15, "onnxruntime": 0.1},
        plan_db={"reference": 12.0, "onnxruntime": 12.0},
        agreement_db={"reference": math.inf, "onnxruntime": 40.0},
    )


@pytest.mark.parametrize("name", REFERENCE)
def test_an_architecture_passes_up_to_the_reference_target(check: Check, name: str) -> None:
    row = check(name, ("reference",))
    assert row.errors == {}
    assert row.batch == "any"
    assert row.equals_trace
    assert row.off_db == math.inf
    assert row.uniform_db["w16a16"] >= 60
    assert row.uniform_db["w8a8"] >= 20
    assert row.agreement_db["reference"] == math.inf
    assert row.shares["reference"] <= 0.15
    assert row.quantizable >= 0.99 * row.weights


@pytest.mark.parametrize("name", BOTH)
def test_an_architecture_passes_on_both_targets(check: Check, name: str) -> None:
    row = check(name, ("reference", "onnxruntime"))
    assert row.faults == []
    assert row.agreement_db["onnxruntime"] >= 35 or row.amplifies
    assert row.seconds.keys() >= {"trace", "calibrate", "measure", "solve", "convert, onnxruntime"}


class Refuses(nn.Module):
    """Runs, but decides by a value, which no export can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) > 1e9 else self.fc(-x)


def test_what_does_not_export_is_named_and_ends_the_row(benchmark: Callable[[str], Any]) -> None:
    class Refusing:
        inputs = staticmethod(lambda samples, generator: {"x": torch.ones(samples, 4)})
        build = staticmethod(lambda name: Refuses().eval())

    row = benchmark("_coverage_check").Check("refuses", Refusing()).run()
    assert list(row.errors) == ["trace"]
    assert row.parameters == 20
    assert row.faults[0].startswith("trace: TraceError: torch.export cannot take Refuses")


def test_a_group_that_is_worst_is_named(benchmark: Callable[[str], Any]) -> None:
    """One input channel a thousand times larger: eight bits keep nothing of the others."""

    class Lopsided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            with torch.no_grad():
                self.first.weight.copy_(torch.eye(4))
                self.second.weight.copy_(torch.eye(4))
                self.second.weight[0, 0] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) * torch.tensor([1e4, 1.0, 1.0, 1.0]))

    class Architecture:
        build = staticmethod(lambda name: Lopsided().eval())

        @staticmethod
        def inputs(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
            return {"x": torch.randn(samples, 4, generator=generator)}

    row = benchmark("_coverage_check").Check("lopsided", Architecture(), ("reference",)).run()
    assert row.uniform_db["w8a8"] < 20
    assert row.worst["w8a8"][0] == "second"
    assert row.worst["w8a8"][1] < 20


def test_a_row_without_faults_passes(good: Any) -> None:
    assert good.faults == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"errors": {"measure": "ValueError: no\nmore"}}, "measure: ValueError: no"),
        ({"off_db": 126.0}, "with quantizers off 126.0 dB"),
        ({"off_db": 90.0, "has_batch_norm": True}, "with quantizers off 90.0 dB"),
        ({"equals_trace": False}, "with quantizers off inf dB"),
        ({"uniform_db": {"w16a16": 59.0, "w8a8": 30.0}}, "59.0 dB at 16 bit"),
        ({"uniform_db": {"w16a16": 70.0, "w8a8": 19.0}}, "below 20 dB at 8 bit, no layer named"),
        ({"shares": {"reference": 0.2}}, "reference at 20.0%"),
        (
            {"agreement_db": {"reference": 99.0, "onnxruntime": 40.0}},
            "reference differs from the simulation",
        ),
        (
            {"agreement_db": {"reference": math.inf, "onnxruntime": 20.0}},
            "onnxruntime agrees at 20.0 dB",
        ),
        (
            {
                "agreement_db": {"reference": math.inf, "onnxruntime": 20.0},
                "layer_db": {"onnxruntime": ("conv", 30.0)},
            },
            "onnxruntime agrees at 20.0 dB",
        ),
        ({"agreement_db": {"reference": math.inf}}, "onnxruntime agrees at nan dB"),
    ],
)
def test_each_fault_is_named(good: Any, changes: dict[str, Any], fault: str) -> None:
    assert dataclasses.replace(good, **changes).faults == [fault]


def test_what_is_explained_is_no_fault(good: Any) -> None:
    explained = {
        "off_db": 126.0,
        "has_batch_norm": True,
        "uniform_db": {"w16a16": 70.0, "w8a8": 19.0},
        "worst": {"w8a8": ("conv", 19.5)},
        "agreement_db": {"reference": math.inf, "onnxruntime": 20.0},
        "layer_db": {"onnxruntime": ("conv", 50.0)},
    }
    row = dataclasses.replace(good, **explained)
    assert row.amplifies
    assert row.faults == []
    assert not good.amplifies
