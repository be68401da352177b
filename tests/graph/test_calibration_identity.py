from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxmpq.graph.calibration_identity import calibration_identity
from fxmpq.graph.state import copy_graph
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange

Calibrated = Callable[..., fx.GraphModule]


def modules(graph: fx.GraphModule, kind: type) -> list:
    return [module for module in graph.modules() if isinstance(module, kind)]


def test_it_is_plain_and_the_same_for_a_copy(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images)
    found = calibration_identity(graph)
    assert json.loads(json.dumps(found)) == found
    assert calibration_identity(copy_graph(graph)) == found


def test_ranges_scales_and_codes_count(
    calibrated: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images)
    found = [calibration_identity(graph)["ranges"]]
    quantizer = modules(graph, ActivationQuantizer)[0]
    quantizer.ranges[quantizer.formats[0].name] = ActivationRange(0.5, 3)
    found.append(calibration_identity(graph)["ranges"])
    weight = modules(graph, WeightQuantizer)[0]
    weight.set_scale(weight.formats[0], weight.scale(weight.formats[0]) * 2)
    found.append(calibration_identity(graph)["ranges"])
    codes = torch.zeros_like(weight.codes(graph.get_parameter(weight.name), weight.formats[0]))
    weight.set_codes(weight.formats[0], codes)
    found.append(calibration_identity(graph)["ranges"])
    assert len(set(found)) == 4


def test_choices_and_biases_that_are_rounded_for_them_do_not_count(
    calibrated: Calibrated, uniform: Calibrated, conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    graph = calibrated(conv_graph, images, "onnxruntime")
    planned = uniform(graph)
    assert any(name.endswith(".rounding") for name in planned.state_dict())
    assert calibration_identity(planned) == calibration_identity(graph)
