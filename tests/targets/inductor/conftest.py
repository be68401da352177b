"""A planned network, and what is compiled of it: every compilation takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, fx

from fxmpq.formats import Precision
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.targets.convert import convert
from fxmpq.targets.target import Converted

Made = Callable[..., fx.GraphModule]


@pytest.fixture(scope="session")
def ready(calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor]) -> fx.GraphModule:
    candidates = [Precision(4, 8), Precision(8, 8), Precision()]
    return calibrated(conv_graph, images, "inductor", candidates=candidates)


@pytest.fixture(scope="session")
def planned(ready: fx.GraphModule) -> fx.GraphModule:
    """The last convolution in 4 bits, the classifier in float, all else in 8."""
    found = {"conv2": "w4a8", "fc": "fp32"}
    groups = require(ready, stage="calibrated").groups
    choices = {group.name: found.get(group.layers[0].name, "w8a8") for group in groups}
    return with_choices(ready, choices)


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(scope="session")
def made(planned: fx.GraphModule, images: list[Tensor], output: Path) -> Converted:
    return convert(planned, output=output, verify=images)
