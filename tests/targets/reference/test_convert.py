from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, fx, nn

from fxmpq.costs.weights import weight_bytes
from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.graph.switch import with_choices
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.targets.convert import convert
from fxmpq.targets.reference.convert import convert_reference

Made = Callable[..., fx.GraphModule]
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)


def every_width() -> list[Precision]:
    return [Precision(bits, 8) for bits in WIDTHS]


@pytest.fixture(scope="module")
def planned(
    calibrated: Made, in_turn: Made, conv_graph: fx.GraphModule, images: list[Tensor]
) -> fx.GraphModule:
    return in_turn(calibrated(conv_graph, images, candidates=every_width()))


@pytest.fixture(scope="module")
def planned_bert(
    in_turn: Made,
    calibrated: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> fx.GraphModule:
    return in_turn(calibrated(bert_graph, token_batches, candidates=every_width()))


def weights_of(graph: fx.GraphModule) -> dict[str, WeightQuantizer]:
    modules = (module for module in graph.modules() if isinstance(module, WeightQuantizer))
    return {module.name: module for module in modules if module.active is not None}


def decode(entry: Mapping[str, object], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Reads a weight from the file as its documentation says, with numpy alone."""
    bits, shape, axis = (entry[key] for key in ("bits", "shape", "channel_axis"))
    assert isinstance(bits, int)
    assert isinstance(shape, list)
    assert isinstance(axis, int)
    stream = np.unpackbits(tensors[str(entry["codes"])], bitorder="little")
    places = stream[: math.prod(shape) * bits].reshape(-1, bits).astype(np.int64)
    unsigned = (places << np.arange(bits)).sum(axis=1)
    codes = np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned).reshape(shape)
    scale = tensors[str(entry["scale"])]
    aligned = scale.reshape([-1 if dim == axis else 1 for dim in range(len(shape))])
    return codes.astype(np.float32) * aligned


FORMATS = ["w4b32a8", "w4ta8", "we4m3ae4m3", "we5m2b9ae5m2", "we2m1b16a8", "we2m1b32ae2m1", "w3b7"]


def decode_any(entry: Mapping[str, object], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Reads a weight of any format as the file's documentation says, with ml_dtypes."""
    numbers, bits, shape, axis, block = (
        entry[key] for key in ("numbers", "bits", "shape", "channel_axis", "block")
    )
    assert isinstance(bits, int)
    assert isinstance(shape, list)
    assert isinstance(axis, int)
    stream = np.unpackbits(tensors[str(entry["codes"])], bitorder="little")
    places = stream[: math.prod(shape) * bits].reshape(-1, bits).astype(np.int64)
    unsigned = (places << np.arange(bits)).sum(axis=1)
    if numbers == "symmetric":
        values = np.where(unsigned >= 1 << (bits - 1), unsigned - (1 << bits), unsigned)
    else:
        kinds = {
            "e4m3": ml_dtypes.float8_e4m3fn,
            "e5m2": ml_dtypes.float8_e5m2,
            "e2m1": ml_dtypes.float4_e2m1fn,
        }
        values = unsigned.astype(np.uint8).view(kinds[str(numbers)])
    values = values.astype(np.float32).reshape(shape)
    scale = tensors[str(entry["scale"])]
    if entry["scale_format"] == "e8m0":
        scale = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    if entry["scale_format"] == "e4m3":
        scale = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scale = scale * tensors[str(entry["tensor_scale"])]
    rows = np.moveaxis(values, axis, 0).reshape(shape[axis], -1)
    if block is not None:
        assert isinstance(block, int)
        scale = np.repeat(scale, block, axis=1)[:, : rows.shape[1]]
        return (rows * scale).reshape(values.shape)
    return (rows * scale.reshape(-1, 1)).reshape(values.shape)


@pytest.mark.parametrize(("model", "formats"), [("conv", FORMATS[2:6]), ("bert", FORMATS)])
def test_every_format_converts_bit_exactly_and_is_read_back(
    in_turn: Made,
    model: str,
    formats: list[str],
    calibrated: Made,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    batches = request.getfixturevalue({"conv": "images", "bert": "token_batches"}[model])
    candidates = [Precision.parse(name) for name in formats]
    graph = calibrated(request.getfixturevalue(f"{model}_graph"), batches, candidates=candidates)
    planned = in_turn(graph)
    made = convert(planned, output=tmp_path, verify=batches)
    assert made.sqnr_db == math.inf
    tensors, manifest = load_file(made.files[0]), json.loads(made.files[1].read_text())
    expected = weights_of(planned)
    assert set(manifest["weights"]) == set(expected)
    assert len({entry["format"] for entry in manifest["weights"].values()}) == len(formats)
    for name, quantizer in expected.items():
        simulated = quantizer(get_tensor(planned, name)).detach()
        entry = manifest["weights"][name]
        assert np.array_equal(decode_any(entry, tensors), simulated.numpy())
        assert quantizer.active is not None
        assert entry["format"] == quantizer.active.name
    state = require(planned, stage="calibrated")
    counted = [
        weight_bytes(group, Precision.parse(state.choices[group.name])) for group in state.groups
    ]
    packed = [tensor.nbytes for name, tensor in tensors.items() if name.startswith("packed.")]
    assert sum(packed) == sum(counted)


def test_the_converted_model_computes_the_simulations_bits(
    planned: fx.GraphModule, images: list[Tensor]
) -> None:
    made = convert(planned, verify=images)
    assert made.sqnr_db == math.inf
    for batch in (images[0], images[1][:1]):
        assert torch.equal(made.run(batch)[0], run_batch(planned, batch)[0])


def test_bert_with_masks_too(
    planned_bert: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    made = convert(planned_bert, verify=token_batches)
    assert made.sqnr_db == math.inf
    module = made.module
    assert isinstance(module, fx.GraphModule)
    with torch.no_grad():
        logits = module(**token_batches[1]).logits
    assert torch.equal(logits, made.run(token_batches[1])[0])


@pytest.mark.parametrize("model", ["planned", "planned_bert"])
def test_the_files_hold_the_simulated_weights(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    graph = request.getfixturevalue(model)
    tensor_file, manifest_file = convert(graph, output=tmp_path).files
    tensors, manifest = load_file(tensor_file), json.loads(manifest_file.read_text())
    expected = weights_of(graph)
    assert set(manifest["weights"]) == set(expected)
    assert {entry["bits"] for entry in manifest["weights"].values()} >= {2, 3, 4, 5}
    for name, quantizer in expected.items():
        entry = manifest["weights"][name]
        simulated = quantizer(get_tensor(graph, name)).detach()
        assert np.array_equal(decode(entry, tensors), simulated.numpy())
        codes = tensors[entry["codes"]]
        assert codes.dtype == np.uint8
        assert codes.size == -(-simulated.numel() * entry["bits"] // 8)


@pytest.mark.parametrize("model", ["planned", "planned_bert"])
def test_no_float_weight_is_left(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    graph = request.getfixturevalue(model)
    made = convert(graph, output=tmp_path)
    tensors = load_file(made.files[0])
    shapes = {tuple(get_tensor(graph, name).shape) for name in weights_of(graph)}
    assert not set(weights_of(graph)) & set(tensors)
    for name, tensor in tensors.items():
        assert tensor.dtype != np.float32 or tensor.shape not in shapes or tensor.ndim == 1, name
    assert isinstance(made.module, nn.Module)
    assert set(made.module.state_dict()) == set(tensors)


def test_the_manifest_tells_plan_and_activations(planned: fx.GraphModule, tmp_path: Path) -> None:
    manifest = json.loads(convert(planned, output=tmp_path).files[1].read_text())
    state = require(planned, stage="calibrated")
    assert manifest["schema"] == "fxmpq.reference"
    assert manifest["version"] == 2
    assert manifest["fingerprint"] == state.fingerprint
    assert manifest["choices"] == state.choices
    active = [
        module
        for module in planned.modules()
        if isinstance(module, ActivationQuantizer) and module.active is not None
    ]
    assert len(manifest["activations"]) == len(active) == 4
    for module in active:
        assert module.active is not None
        found = module.ranges[module.active.name]
        assert manifest["activations"][module.name] == {
            "format": f"uint{module.active.bits}",
            "numbers": "affine",
            "bits": module.active.bits,
            "scale": found.scale,
            "zero_point": found.zero_point,
        }


def test_fewer_bits_make_a_smaller_file(
    calibrated: Made,
    uniform: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    graph = calibrated(bert_graph, token_batches)
    sizes = []
    for index in range(5):
        made = convert(uniform(graph, index), output=tmp_path / str(index), verify=False)
        sizes.append(made.files[0].stat().st_size)
    assert sizes == sorted(sizes)
    weights = sum(
        get_tensor(graph, name).numel()
        for name in {
            layer.weight
            for group in require(graph, stage="calibrated").groups
            for layer in group.layers
        }
    )
    # From 2 to 8 bits a weight grows by 6 bits.
    assert sizes[-1] - sizes[0] == pytest.approx(weights * 6 / 8, abs=200)


def test_files_are_replaced_whole(planned: fx.GraphModule, tmp_path: Path) -> None:
    for _ in range(2):
        made = convert(planned, output=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    assert made.files == (tmp_path / "model.safetensors", tmp_path / "model.json")


def test_the_planned_graph_is_left_alone(planned: fx.GraphModule, images: list[Tensor]) -> None:
    before, expected = set(planned.state_dict()), run_batch(planned, images[0])[0]
    convert_reference(planned, None)
    assert set(planned.state_dict()) == before
    assert torch.equal(run_batch(planned, images[0])[0], expected)


def test_the_report_names_the_formats(planned: fx.GraphModule) -> None:
    rows = {row.layer: row for row in convert_reference(planned, None).layers}
    assert rows["stem.0"].asked == "w2a8"
    assert rows["stem.0"].kernel == "float on dequantized int2 weights, uint8 input"
    assert {row.reason for row in rows.values()} == {""}


def test_weight_only_and_float_layers(
    calibrated: Made, conv_graph: fx.GraphModule, images: list[Tensor], tmp_path: Path
) -> None:
    candidates = [Precision(4), Precision()]
    graph = calibrated(conv_graph, images, candidates=candidates, exclude=["stem.0"])
    groups = require(graph, stage="calibrated").groups
    choices = {group.name: "fp32" if group.name in ("stem.0", "fc") else "w4" for group in groups}
    made = convert(with_choices(graph, choices), output=tmp_path, verify=images)
    assert made.sqnr_db == math.inf
    manifest = json.loads(made.files[1].read_text())
    assert manifest["activations"] == {}
    assert set(manifest["weights"]) == {"conv1.weight", "conv2.weight", "downsample.0.weight"}
    assert {"stem.0.weight", "fc.weight"} <= set(load_file(made.files[0]))
    rows = {row.layer: row for row in made.layers}
    assert rows["conv1"].kernel == "float on dequantized int4 weights, float input"
    assert rows["stem.0"].reason == "kept in float by the user"
    assert rows["fc"].reason == "the plan keeps it in float"
