from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import PrecisionError, TargetError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.inductor import INDUCTOR
from fxmpq.targets.inductor import convert as module
from fxmpq.targets.reference.convert import convert_reference
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]
Agreement = Callable[[Converted, fx.GraphModule, Tensor], float]


def test_the_compiled_graph_agrees_with_the_simulation(
    made: Converted, planned: fx.GraphModule, agreement: Agreement
) -> None:
    assert made.sqnr_db > 40
    batch = torch.randn(17, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert made.run(batch)[0].shape == (17, 5)
    assert agreement(made, planned, batch) > 40


def test_every_layer_tells_its_kernel(made: Converted) -> None:
    held = "its 4-bit codes are held in int8: as large as w8, as fast"
    found = {row.layer: (row.asked, row.kernel, row.reason) for row in made.layers}
    assert found == {
        "stem.0": ("w8a8", "onednn.qconv_pointwise relu to uint8", ""),
        "conv1": ("w8a8", "onednn.qconv_pointwise relu to uint8", ""),
        "downsample.0": ("w8a8", "onednn.qconv2d_pointwise sum relu to float32", ""),
        "conv2": ("w4a8", "onednn.qconv_pointwise to uint8", held),
        "fc": ("fp32", "float", "the plan keeps it in float"),
    }


def test_files_are_those_of_the_reference(
    made: Converted, planned: fx.GraphModule, output: Path, tmp_path: Path
) -> None:
    expected = convert_reference(planned, tmp_path).files
    assert [file.parent for file in made.files] == [output] * len(expected)
    for one, other in zip(made.files, expected, strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


class Sentences(nn.Module):
    """A table, a layer over positions, one whose weight is the table, and a convolution.

    One layer is used twice, and stored positions are looked up.
    """

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(20, 16), nn.Embedding(8, 16)
        self.mix, self.hidden = nn.Linear(8, 8), nn.Linear(16, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, stride=2)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("positions", torch.arange(8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place(self.positions)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = self.hidden(nn.functional.gelu(self.hidden(x)))
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def test_layers_on_any_layout_run_on_integers(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    ids = torch.randint(20, (4, 8))
    graph = uniform(calibrated(trace(Sentences().eval(), ids), [ids], "inductor"))
    made = convert(graph, verify=[ids])
    assert made.sqnr_db > 40
    found = {row.layer: row.kernel for row in made.layers}
    assert found == {
        "table": "aten.embedding of int8 codes",
        "place": "float32 constant",
        "mix": "onednn.qlinear_pointwise to float32",
        "hidden": "onednn.qlinear_pointwise gelu to uint8",
        "hidden#2": "onednn.qlinear_pointwise to uint8",
        "conv": "onednn.qconv_pointwise to float32",
        "table#2": "onednn.qlinear_pointwise to float32",
    }


@pytest.mark.parametrize("precision", ["w4", "w8b32a8", "w8a4"])
def test_what_it_would_not_run_on_integers_is_refused(
    conv_graph: fx.GraphModule, precision: str
) -> None:
    candidates = [Precision.parse(precision)]
    with pytest.raises(
        PrecisionError, match=rf"'inductor' (cannot run {precision}; it )?runs conv"
    ):
        insert_quantizers(conv_graph, INDUCTOR.rules, candidates=candidates)


def test_without_a_compiler_nothing_is_begun(
    planned: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise TargetError("no C++ compiler")

    monkeypatch.setattr(module, "check_compiler", missing)
    with pytest.raises(TargetError, match="no C"):
        module.convert_inductor(planned, tmp_path, "inductor", is_bfloat16=False)
    assert not list(tmp_path.iterdir())


def test_what_the_compiler_fails_on_is_an_error(
    planned: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[Tensor]:
        raise AssertionError("expected size 5==5\nand more")

    monkeypatch.setattr(module.CompiledGraph, "__call__", fail)
    with pytest.raises(TargetError, match="AssertionError: expected size 5==5. Target"):
        module.convert_inductor(planned, None, "inductor", is_bfloat16=False)
