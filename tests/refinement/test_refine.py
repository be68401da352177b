from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.errors import BatchError, CalibrationError, FxmpqError, PlanError
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.refinement.refine import check_refinement
from fxmpq.refinement.walk import Walk
from fxmpq.sensitivity.measure import measure
from fxmpq.steps import prepare

from .conftest import RAN, Subject, assert_same, contents, refine

pytestmark = pytest.mark.usefixtures("stand_ins")


def test_a_recipe_is_its_methods_one_after_the_other(
    conv: Subject, choices: dict[str, str]
) -> None:
    whole = refine(conv.calibrated, choices, conv.batches, "flip and widen")
    one = refine(conv.calibrated, choices, conv.batches, "flip")
    other = refine(one, None, conv.batches, "widen")
    assert_same(contents(whole), contents(other))
    state = state_of(whole)
    assert state.refinements == state_of(other).refinements
    assert state.choices == choices
    names = [layer.name for group in state.groups for layer in group.layers]
    assert sorted(found.layer for found in state.refinements) == sorted([*names, ""])
    assert [found.method for found in state.refinements] == ["flip"] * len(names) + ["widen"]


def test_what_it_is_given_stays_as_it_was(conv: Subject, choices: dict[str, str]) -> None:
    graphs = [(conv.calibrated, choices), (conv.planned, None), (conv.calibrated, None)]
    for graph, plan in graphs:
        before, output = contents(graph), graph(conv.batches[0])
        refined = refine(graph, plan, conv.batches, "flip")
        assert_same(contents(graph), before)
        assert torch.equal(graph(conv.batches[0]), output)
        assert state_of(graph).refinements == ()
        assert len(state_of(refined).refinements) > 0


def test_the_graph_may_be_calibrated_or_planned(conv: Subject, choices: dict[str, str]) -> None:
    one = refine(conv.calibrated, choices, conv.batches, "flip")
    other = refine(conv.planned, None, conv.batches, "flip")
    third = refine(conv.planned, fxmpq.Plan(choices), conv.batches, "flip")
    assert_same(contents(one), contents(other))
    assert_same(contents(one), contents(third))
    assert not torch.equal(one(conv.batches[0]), conv.planned(conv.batches[0]))


def test_equal_seeds_give_equal_bits(conv: Subject) -> None:
    seeds = [refine(conv.planned, None, conv.batches, "flip", seed=seed) for seed in (3, 3, 4)]
    assert_same(contents(seeds[0]), contents(seeds[1]))
    assert not torch.equal(seeds[0](conv.batches[0]), seeds[2](conv.batches[0]))


def test_it_works_within_inference_mode(conv: Subject) -> None:
    expected = refine(conv.planned, None, conv.batches, "flip")
    with torch.inference_mode():
        batches = [batch.clone() for batch in conv.batches]
        found = refine(conv.planned, None, batches, "flip")
    assert_same(contents(found), contents(expected))
    assert not any(tensor.is_inference() for tensor in found.buffers())


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("flp", {}, FxmpqError, "no refinement 'flp'; closest: 'flip'"),
        ("flip", {"sede": 1}, FxmpqError, "no option 'sede' with the refinement 'flip'.*'seed'"),
        ("widen", {"seed": 1}, FxmpqError, "no option 'seed' with .* 'widen'; it takes none"),
        ("flip and widen", {"seed": 1}, FxmpqError, "takes no options, found 'seed'.* flip, widen"),
        ("train", {}, FxmpqError, "the refinement 'train' needs the option 'loss'"),
    ],
)
def test_unusable_requests_fail_at_the_call(
    conv: Subject, method: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def batches() -> Any:
        raise AssertionError("data was read")
        yield

    with pytest.raises(error, match=message):
        refine(conv.planned, None, batches(), method, **options)


def test_unusable_plans_and_data_fail_at_the_call(
    conv: Subject, subject_of: Callable[[str], Subject], choices: dict[str, str]
) -> None:
    with pytest.raises(PlanError, match="'widen' needs a plan.*'flip'"):
        refine(conv.calibrated, None, conv.batches, "flip and widen")
    with pytest.raises(PlanError, match="no precision for"):
        refine(conv.calibrated, {}, conv.batches, "flip")
    with pytest.raises(PlanError, match="no group of this graph; closest: 'conv1'"):
        refine(conv.calibrated, {**choices, "conv11": "w3a8"}, conv.batches, "flip")
    plan = fxmpq.Plan(choices, fingerprint="of another")
    with pytest.raises(PlanError, match="another"):
        refine(conv.calibrated, plan, conv.batches, "flip")
    with pytest.raises(CalibrationError, match="the calibration data is empty"):
        refine(conv.planned, None, [], "flip")
    with pytest.raises(BatchError, match="Wrap it in a list"):
        refine(conv.planned, None, conv.batches[0], "widen")
    with pytest.raises(BatchError, match="must have shape"):
        refine(conv.planned, None, [conv.batches[0], torch.zeros(2, 3)], "widen")
    with pytest.raises(FxmpqError, match="calibrate"):
        refine(prepare(trace(nn.Linear(2, 2), torch.zeros(3, 2)), "reference"), {}, [], "flip")
    assert RAN == []


def test_methods_that_train_get_batches_with_labels(conv: Subject) -> None:
    batches = [(images, torch.zeros(len(images), dtype=torch.long)) for images in conv.batches]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    refined = refine(conv.planned, None, batches, "train", loss=loss)
    [found] = state_of(refined).refinements
    assert found.after == pytest.approx(float(loss(conv.planned, batches[0]).detach()))


def test_labels_that_nobody_can_give_are_refused() -> None:
    check_refinement("train", ["loss"])
    with pytest.raises(FxmpqError, match="trains with labels; .*method='train'"):
        check_refinement("train", has_labels=False)


@pytest.fixture(scope="module")
def mixed(conv_graph: fx.GraphModule, images: list) -> fx.GraphModule:
    """Widths, blocks and a float format among the candidates; the classifier has one of its own."""
    names = ["w2a8", "w4a4", "w4a8", "w4b4a8", "we2m1a8"]
    graph = prepare(conv_graph, "reference", candidates=names, keep={"fc": "w8a8"})
    return fxmpq.calibrate(graph, images, progress=False)


def test_stitching_rounds_each_weight_format_by_itself(
    mixed: fx.GraphModule, conv_graph: fx.GraphModule, images: list
) -> None:
    stitched = refine(mixed, None, images, "flip")
    state = state_of(stitched)
    assert state.choices == {}
    assert {found.weight_format for found in state.refinements} == {
        "int2",
        "int4",
        "int4b4",
        "int8",
    }
    others = {group.name for group in state.groups if group.name != "fc"}
    for name, precision in (("int2", "w2a8"), ("int4", "w4a8"), ("int4b4", "w4b4a8")):
        # By hand: all layers that can at this format and wide activations, the others in float.
        layers = [f.layer for f in state.refinements if f.weight_format == name]
        assert "fc" not in layers
        alone = prepare(conv_graph, "reference", candidates=[precision], exclude=["fc"])
        alone = fxmpq.calibrate(alone, images, progress=False)
        plan = {g.name: precision if g.name in others else "fp32" for g in state_of(alone).groups}
        expected = refine(alone, plan, images, "flip")
        for layer in layers:
            weight = layer_of(state, layer)
            one = stitched.get_submodule(weight.weight_quantizer)
            other = expected.get_submodule(weight.weight_quantizer)
            for kind in ("codes", "scale"):
                assert torch.equal(
                    one.get_buffer(f"{kind}_{name}"), other.get_buffer(f"{kind}_{name}")
                )
            shifts = [
                found.get_submodule(weight.bias_correction).get_buffer(f"shift_{name}")
                for found in (stitched, expected)
            ]
            assert torch.equal(*shifts)
    for module in stitched.modules():
        if isinstance(module, WeightQuantizer):
            assert module.active is None
            for found in module.formats:
                assert (module.stored_codes(found) is not None) == found.is_integer


def layer_of(state: Any, name: str) -> Any:
    return next(one for group in state.groups for one in group.layers if one.name == name)


def test_a_plan_chooses_among_the_rounded_copies(
    mixed: fx.GraphModule, images: list, in_turn: Callable[[fx.GraphModule], fx.GraphModule]
) -> None:
    stitched = refine(mixed, None, images, "flip")
    planned = in_turn(stitched)
    for view in Walk(planned, images).layers():
        stored = view.quantizer.stored_codes(view.number_format)
        assert (stored is not None) == view.number_format.is_integer
    assert not torch.equal(planned(images[0]), in_turn(mixed)(images[0]))
    # What is measured is what will be deployed.
    found = measure(stitched, images, method="sqnr", progress=False)
    plain = measure(mixed, images, method="sqnr", progress=False)
    name = state_of(mixed).groups[0].name
    assert found.value(name, "w2a8") != plain.value(name, "w2a8")
    assert found.value(name, "we2m1a8") == plain.value(name, "we2m1a8")


def test_stitching_resumes_too(mixed: fx.GraphModule, images: list, tmp_path: Path) -> None:
    one = refine(mixed, None, images, "flip", resume=tmp_path)
    count = len(RAN)
    other = refine(mixed, None, images, "flip", resume=tmp_path)
    assert len(RAN) == count == len(state_of(one).refinements)
    assert_same(contents(one), contents(other))


def test_without_anything_to_round_nothing_is_done(
    conv_graph: fx.GraphModule, images: list
) -> None:
    graph = prepare(conv_graph, "reference", candidates=["we4m3a8"])
    graph = fxmpq.calibrate(graph, images, progress=False)
    refined = refine(graph, None, images, "flip")
    assert (state_of(refined).refinements, RAN) == ((), [])
    assert all(torch.equal(a, b) for a, b in zip(
        run_batch(graph, images[0]), run_batch(refined, images[0]), strict=True
    ))  # fmt: skip
