from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import BatchError, FxmpqError
from fxmpq.graph.state import copy_graph
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from fxmpq.refinement.walk import Walk

Subject = Any
Values = Callable[[fx.GraphModule, object], dict[str, object]]


def source(node: fx.Node, position: int) -> str:
    found = node.args[position]
    assert isinstance(found, fx.Node)
    return found.name


def test_both_streams_are_the_graphs_own_to_the_last_bit(
    subject: Subject, values_of: Values
) -> None:
    floats = [values_of(subject.calibrated, batch) for batch in subject.batches]
    planned = [values_of(subject.planned, batch) for batch in subject.batches]
    seen = 0
    for view in Walk(copy_graph(subject.planned), subject.batches).layers():
        seen += 1
        x, y = source(view.node, view.operator.input), view.node.name
        for batch in range(len(view)):
            assert torch.equal(view.float_input(batch), floats[batch][x])
            assert torch.equal(view.input(batch), planned[batch][x])
            assert torch.equal(view.float_output(batch), floats[batch][y])
            assert torch.equal(view.quantized_output(batch), planned[batch][y])
    assert seen == sum(
        node.name in {layer.node for group in groups(subject) for layer in group.layers}
        for node in subject.planned.graph.nodes
    )


def groups(subject: Subject) -> Any:
    return subject.planned.meta["fxmpq"].groups


def needed(walk: Walk, nodes: list[fx.Node], position: int) -> set[fx.Node]:
    """By definition: what is there before a node runs, and is read by it or a later node."""

    def reads(node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for entry in node.all_input_nodes:
            is_quantizer = isinstance(
                walk._modules.get(str(entry.target)), (ActivationQuantizer, WeightQuantizer)
            )
            found |= reads(entry) if is_quantizer else {entry}
        return found

    before = set(nodes[:position])
    later = {entry for node in nodes[position:] if node.op != "output" for entry in reads(node)}
    return before & later


def test_only_what_is_still_read_is_kept(subject: Subject) -> None:
    walk = Walk(copy_graph(subject.planned), subject.batches)
    nodes = list(walk.graph.graph.nodes)
    for view in walk.layers():
        wanted = needed(walk, nodes, nodes.index(view.node))
        for values in (*walk._float, *walk._quantized):
            kept = {node for node in values if node.op != "placeholder"}
            assert kept == {node for node in wanted if node in walk._stored} - {
                node for node in wanted if node.op == "placeholder"
            }
    assert not [node for values in walk._float for node in values if node.users]


def test_a_long_chain_keeps_one_value_a_batch(plan_of: Callable[..., Subject]) -> None:
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(4, 4), nn.ReLU())]
    batches = [torch.randn(n, 4) for n in (2, 3, 5)]
    subject = plan_of(nn.Sequential(*layers), batches)
    walk = Walk(subject.planned, subject.batches)
    counts = [len(values) for _ in walk.layers() for values in (*walk._float, *walk._quantized)]
    assert counts == [1] * 6 * 2 * 3


def test_outputs_nobody_reads_are_dropped(subject_of: Callable[[str], Subject]) -> None:
    subject = subject_of("two_inputs")
    walk = Walk(subject.planned, subject.batches)
    for _ in walk.layers():
        pass
    assert [len(values) for values in (*walk._float, *walk._quantized)] == [0] * 4


@pytest.mark.parametrize("what", ["codes", "scale", "bias", "input range"])
def test_later_layers_meet_what_earlier_ones_became(
    subject_of: Callable[[str], Subject], values_of: Values, what: str
) -> None:
    subject = subject_of("bert" if what == "input range" else "conv")
    changed = copy_graph(subject.planned)
    for position, view in enumerate(Walk(changed, subject.batches).layers()):
        if position == 5 and what == "input range":
            kept = view.input_quantizer.ranges[view.input_quantizer.active.name]
            wider = type(kept)(kept.scale * 2, kept.zero_point)
            view.input_quantizer.ranges[view.input_quantizer.active.name] = wider
        elif position == 1 and what == "codes":
            codes = view.quantizer.codes(view.weight, view.number_format)
            view.quantizer.set_codes(view.number_format, -codes.clamp(min=-1))
        elif position == 1 and what == "scale":
            scale = view.quantizer.scale(view.number_format)
            view.quantizer.set_scale(view.number_format, scale * 1.5)
        elif position == 1 and what == "bias":
            view.set_bias(torch.ones(view.weight.shape[0]))
            assert torch.allclose(view.quantized_bias, torch.ones(view.weight.shape[0]))
    different = 0
    values = [values_of(changed, batch) for batch in subject.batches]
    before = [values_of(subject.planned, batch) for batch in subject.batches]
    for view in Walk(changed, subject.batches).layers():
        for batch in range(len(view)):
            expected = values[batch][view.node.name]
            assert torch.equal(view.quantized_output(batch), expected)
            different += not torch.equal(expected, before[batch][view.node.name])
    assert different >= 2


def test_a_change_during_the_walk_reaches_what_follows(
    subject_of: Callable[[str], Subject], values_of: Values
) -> None:
    subject = subject_of("conv")
    changed = copy_graph(subject.planned)
    found: list[Tensor] = []
    for position, view in enumerate(Walk(changed, subject.batches).layers()):
        if position == 0:
            view.quantizer.set_codes(view.number_format, torch.zeros_like(view.weight))
        found = [view.input(batch) for batch in range(len(view))]
        name = source(view.node, view.operator.input)
    for batch, entry in enumerate(found):
        assert torch.equal(entry, values_of(changed, subject.batches[batch])[name])
        assert not torch.equal(entry, values_of(subject.planned, subject.batches[batch])[name])


def test_shared_weights_are_handed_out_once_as_the_first(
    subject_of: Callable[[str], Subject],
) -> None:
    views = Walk(subject_of("tied").planned, subject_of("tied").batches).layers()
    assert [(view.layer.weight, view.is_first) for view in views] == [
        ("embedding.weight", True),
        ("twice.weight", True),
        ("twice.weight", False),
        ("embedding.weight", False),
    ]


def test_a_float_layer_before_it_leaves_the_next_of_that_weight_the_first(
    plan_of: Callable[..., Subject],
) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.weight = one.weight
    batches = [torch.randn(3, 4)]
    subject = plan_of(nn.Sequential(one, nn.ReLU(), two), batches, ("w4a8",), exclude=["0"])
    found = [(v.layer.name, v.is_first) for v in Walk(subject.planned, batches).layers()]
    assert found == [("0#2", True)]


def test_float_layers_are_not_handed_out(plan_of: Callable[..., Subject]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(3, 4)]
    subject = plan_of(model, batches, ("fp32", "w4a8"))
    assert [view.layer.name for view in Walk(subject.planned, batches).layers()] == ["2"]
    assert list(Walk(subject.calibrated, batches).layers()) == []


def test_a_quantizer_that_many_read_runs_once_a_run(subject_of: Callable[[str], Subject]) -> None:
    subject = subject_of("bert")
    calls: list[str] = []
    for block in Walk(subject.planned, subject.batches).blocks():
        names = {name for layer in block.layers for name in layer.modules}

        def stand_in(name: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                calls.append(name)
                return x

            return run

        calls.clear()
        block.output(0, {name: stand_in(name) for name in names})
        assert sorted(calls) == sorted(names)


def test_inputs_made_in_inference_mode_can_be_trained_with() -> None:
    torch.manual_seed(0)
    from fxmpq.calibration.calibrate import calibrate
    from fxmpq.graph.switch import with_choices
    from fxmpq.steps import prepare

    model = nn.Sequential(nn.Linear(4, 2))
    graph = calibrate(
        prepare(trace(model, torch.randn(3, 4)), "reference"), [torch.randn(3, 4)], progress=False
    )
    with torch.inference_mode():
        batch = torch.randn(3, 4)
    planned = with_choices(graph, {"0": "w4a8"})
    view = next(Walk(planned, [batch]).layers())
    with torch.enable_grad():
        weight = view.weight.clone().requires_grad_()
        view.output(view.raw_input(0), weight, view.float_bias).sum().backward()
    assert torch.allclose(weight.grad, batch.clone().sum(0).expand(2, 4))


def test_bad_graphs_and_batches_are_refused_at_once(
    conv_graph: fx.GraphModule, subject_of: Callable[[str], Subject]
) -> None:
    with pytest.raises(FxmpqError, match="prepare"):
        Walk(conv_graph, [])
    with pytest.raises(BatchError, match="must have shape"):
        Walk(subject_of("conv").planned, [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8)])
