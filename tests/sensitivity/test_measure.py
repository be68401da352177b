from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from fxmpq.errors import BatchError, CalibrationError, FxmpqError
from fxmpq.sensitivity.measure import METHODS, check_method, measure
from fxmpq.sensitivity.projected import projected
from fxmpq.sensitivity.sqnr import sqnr


@pytest.fixture(scope="module")
def graph(
    calibrated: Callable[..., fx.GraphModule], conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return calibrated(conv_graph, images)


def test_methods_are_called_with_their_options(graph: fx.GraphModule, images: list[Tensor]) -> None:
    found = measure(graph, iter(images), probes=2, seed=5, progress=False)
    expected = projected(graph, images, probes=2, seed=5)
    assert found.method == "projected"
    assert np.array_equal(found.projections, expected.projections)
    swept = measure(graph, images, method="sqnr", progress=False)
    assert swept.values == sqnr(graph, images).values


def test_an_unknown_method_is_an_error_before_any_work(
    graph: fx.GraphModule,
) -> None:
    def never() -> object:
        raise AssertionError("the data was read")
        yield

    with pytest.raises(FxmpqError, match="no sensitivity method 'hessian'; there are"):
        measure(graph, never(), method="hessian")
    with pytest.raises(FxmpqError, match="'projected', 'sqnr'|'sqnr', 'projected'"):
        check_method("hessian")
    for name in METHODS:
        check_method(name)


def test_bad_data_is_an_error(graph: fx.GraphModule) -> None:
    with pytest.raises(CalibrationError, match="is empty"):
        measure(graph, [])
    with pytest.raises(BatchError, match="Wrap it in a list"):
        measure(graph, torch.ones(2, 3, 16, 16))
    with pytest.raises(BatchError, match="must have shape"):
        measure(graph, [torch.ones(2, 3, 8, 8)], progress=False)


def test_an_uncalibrated_graph_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        measure(conv_graph, images)


@pytest.mark.parametrize("options", [{"probe": 3}, {"seeds": 1}])
def test_an_unknown_option_is_an_error_before_any_work(
    graph: fx.GraphModule, options: dict[str, int]
) -> None:
    def never() -> object:
        raise AssertionError("the data was read")
        yield

    name = next(iter(options))
    with pytest.raises(FxmpqError, match=f"no option '{name}' with the method 'projected'"):
        measure(graph, never(), progress=False, **options)
    with pytest.raises(FxmpqError, match="no option 'probes' with the method 'sqnr'; there are no"):
        check_method("sqnr", ["probes"])
