"""What the converters of several targets are tested with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.batches import Batch
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.target import Converted, agreement_db

Made = Callable[..., fx.GraphModule]
Agreement = Callable[[Converted, fx.GraphModule, Batch], float]
Check = Callable[[Converted, fx.GraphModule, float], None]


@pytest.fixture(scope="session")
def agreement() -> Agreement:
    """What a converted graph computes against its simulation, in dB."""

    def found(made: Converted, planned: fx.GraphModule, batch: Batch) -> float:
        expected = [leaf for leaf in run_batch(planned, batch) if isinstance(leaf, Tensor)]
        return agreement_db(expected, made.run(batch))

    return found


@pytest.fixture(scope="session")
def check_batch_sizes(agreement: Agreement) -> Check:
    """Checks images in batches of few and of many: `check(made, planned, least)`, in dB."""

    def check(made: Converted, planned: fx.GraphModule, least: float) -> None:
        for samples in (1, 3, 17):
            generator = torch.Generator().manual_seed(samples)
            batch = torch.randn(samples, 3, 16, 16, generator=generator)
            assert agreement(made, planned, batch) > least

    return check


@pytest.fixture(scope="session")
def check_masks_and_lengths(agreement: Agreement) -> Check:
    """Checks tokens of other lengths, and that masks matter: `check(made, planned, least)`."""

    def check(made: Converted, planned: fx.GraphModule, least: float) -> None:
        for shape in ((1, 5), (6, 12)):
            ids = torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(0))
            mask = torch.ones_like(ids)
            mask[0, 2:] = 0
            batch = {"attention_mask": mask, "input_ids": ids}
            assert agreement(made, planned, batch) > least
            (masked,) = made.run(batch)
            (unmasked,) = made.run({**batch, "attention_mask": torch.ones_like(ids)})
            assert not torch.allclose(unmasked[0], masked[0], atol=1e-3)

    return check


@pytest.fixture(scope="session")
def convolutions_of_rank(calibrated: Made, uniform: Made) -> Callable[[int, str], Converted]:
    """Converts two convolutions over 1, 2 or 3 dimensions for a target."""

    def make(rank: int, target: str) -> Converted:
        torch.manual_seed(0)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        x = torch.randn(4, 2, *[6] * rank)
        model = nn.Sequential(convolution(2, 4, 3), nn.ReLU(), convolution(4, 3, 2))
        return convert(uniform(calibrated(trace(model, x), [x], target), 2))

    return make


@pytest.fixture(scope="session")
def all_in_float(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> Callable[[str], Converted]:
    """Converts a network of which a plan quantizes nothing for a target."""

    def make(target: str) -> Converted:
        graph = calibrated(conv_graph, images, target, exclude=["*"])
        choices = {group.name: "fp32" for group in require(graph, stage="calibrated").groups}
        return convert(with_choices(graph, choices), verify=images)

    return make


class Options(nn.Module):
    """Takes a tensor it does not need and options, returns several kinds of output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, unused: Tensor, scale: float = 1.0, flag: bool = False
    ) -> dict[str, Tensor]:
        y = self.fc(x) * scale
        return {"y": y, "label": y.argmax(-1), "x": x}


@pytest.fixture
def check_options(calibrated: Made, uniform: Made) -> Callable[[str], None]:
    """Checks a target on options, unused inputs and integer outputs."""

    def check(target: str) -> None:
        torch.manual_seed(0)
        batch = {"x": torch.randn(6, 4), "unused": torch.zeros(6, 2), "scale": 2.0, "flag": True}
        graph = uniform(calibrated(trace(Options(), batch), [batch], target), 2)
        made = convert(graph, verify=[batch])
        y, label, x = made.run(batch)
        assert torch.allclose(y, run_batch(graph, batch)[0], atol=1e-4)
        assert torch.equal(label, y.argmax(-1))
        assert torch.equal(x, batch["x"])

    return check
