from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.errors import FxmpqError
from fxmpq.graph.state import Refinement, copy_graph
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.refinement.bias_tuning import bias_tuning
from fxmpq.refinement.outputs import model_outputs, output_error
from fxmpq.refinement.units import Units

Subject = Any


def tune(graph: fx.GraphModule, batches: list, **options: object) -> tuple[fx.GraphModule, list]:
    tuned = copy_graph(graph)
    with torch.no_grad():
        return tuned, bias_tuning(tuned, batches, **{"units": Units(), "epochs": 2, **options})


def outputs(graph: fx.GraphModule, batches: list, *, quantized: bool = True) -> list:
    with torch.no_grad():
        return [model_outputs(graph, batch, quantized=quantized) for batch in batches]


def divergence(graph: fx.GraphModule, batches: list) -> float:
    """KL divergence of the planned model's classes from the float one's, first 2-D output."""
    total = 0.0
    for planned, wanted in zip(
        outputs(graph, batches), outputs(graph, batches, quantized=False), strict=True
    ):
        position = next(i for i, y in enumerate(wanted) if y.dim() == 2)
        p, q = (found[position].double().softmax(-1) for found in (wanted, planned))
        total += float((p * (p / q).log()).sum())
    return total


def squared_error(graph: fx.GraphModule, batches: list) -> float:
    return output_error(graph, batches, outputs(graph, batches, quantized=False))


def codes(graph: fx.GraphModule) -> dict[str, Tensor]:
    return {
        name: module.codes(graph.get_parameter(module.name).detach(), module.active)
        for name, module in graph.named_modules()
        if isinstance(module, WeightQuantizer) and module.active is not None
    }


MEASURES = {"kl": divergence, "mse": squared_error}


@pytest.mark.parametrize("loss", MEASURES)
def test_the_loss_falls_and_codes_and_weights_stay(subject: Subject, loss: str) -> None:
    if loss == "kl" and not any(y.dim() == 2 for y in outputs(subject.planned, subject.batches)[0]):
        loss = "mse"
    measure = MEASURES[loss]
    tuned, [entry] = tune(subject.planned, subject.batches, loss=loss)
    assert measure(tuned, subject.batches) < measure(subject.planned, subject.batches)
    assert entry.before == pytest.approx(squared_error(subject.planned, subject.batches))
    assert entry.after == pytest.approx(squared_error(tuned, subject.batches))
    before, after = codes(subject.planned), codes(tuned)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name, parameter in tuned.named_parameters():
        assert parameter.data_ptr() == subject.planned.get_parameter(name).data_ptr()
        assert parameter.grad is None
    assert not any(buffer.requires_grad for buffer in tuned.buffers())


def test_without_scales_only_shifts_change(subject_of: Callable) -> None:
    subject = subject_of("resnet_onnxruntime")
    tuned, _ = tune(subject.planned, subject.batches, scales=False)
    before, after = subject.planned.state_dict(), tuned.state_dict()
    changed = {n for n in after if n not in before or not torch.equal(after[n], before[n])}
    assert changed
    assert all(".shift_" in name for name in changed)
    scaled, _ = tune(subject.planned, subject.batches)
    both = {n for n, t in scaled.state_dict().items() if ".scale_" in n and (t != before[n]).any()}
    assert both


def test_scales_per_tensor_stay(plan_of: Callable) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(8, 4), torch.randn(5, 4)]
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    subject = plan_of(model, batches, ("w2ta8",))
    tuned, _ = tune(subject.planned, batches, epochs=10, learning_rate=1e-2)
    for name, tensor in subject.planned.state_dict().items():
        if ".scale_" in name:
            assert torch.equal(tuned.state_dict()[name], tensor)
    assert divergence(tuned, batches) < divergence(subject.planned, batches)


def test_one_layer_gets_its_best_bias(plan_of: Callable) -> None:
    torch.manual_seed(0)
    batches = [torch.rand(16, 5), torch.rand(16, 5)]
    subject = plan_of(nn.Linear(5, 3), batches, ("w2a8",))
    tuned, _ = tune(
        subject.planned, batches, loss="mse", scales=False, epochs=40, learning_rate=1e-2
    )
    found = torch.cat(
        [
            q - y
            for [q], [y] in zip(
                outputs(tuned, batches), outputs(tuned, batches, quantized=False), strict=True
            )
        ]
    )
    assert float(found.mean(dim=0).abs().max()) < 1e-3 * float(found.abs().max())


def test_a_training_that_fails_changes_nothing(subject_of: Callable) -> None:
    subject = subject_of("conv")
    tuned, [entry] = tune(subject.planned, subject.batches, learning_rate=1e6)
    assert entry.after == entry.before
    for before, after in zip(
        outputs(subject.planned, subject.batches), outputs(tuned, subject.batches), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_loss_suits_the_outputs(subject_of: Callable, plan_of: Callable) -> None:
    subject = subject_of("two_inputs")

    def same(a: fx.GraphModule, b: fx.GraphModule) -> bool:
        pairs = zip(outputs(a, subject.batches), outputs(b, subject.batches), strict=True)
        return all(
            torch.equal(p, q) for left, right in pairs for p, q in zip(left, right, strict=True)
        )

    chosen = tune(subject.planned, subject.batches)[0]
    assert same(chosen, tune(subject.planned, subject.batches, loss="kl")[0])
    assert not same(chosen, tune(subject.planned, subject.batches, loss="mse")[0])
    torch.manual_seed(0)
    batches = [torch.randn(6, 4)]
    single = plan_of(nn.Linear(4, 1), batches, ("w2a8",)).planned
    assert tune(single, batches)[1][0].after < tune(single, batches)[1][0].before
    with pytest.raises(FxmpqError, match=r"two classes.*\[6, 1\].*loss='mse'"):
        tune(single, batches, loss="kl")


class Passes(nn.Module):
    """Returns, before its logits, what no layer has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, self.layer(x)


def test_outputs_that_the_plan_does_not_change_are_no_logits(plan_of: Callable) -> None:
    torch.manual_seed(0)
    model, batches = Passes(), [torch.randn(12, 4)]
    tuned, [found] = tune(plan_of(model, batches, ("w2a8",)).planned, batches)
    assert found.after < found.before
    alone, _ = tune(plan_of(model.layer, batches, ("w2a8",)).planned, batches)
    assert torch.equal(tuned(batches[0])[1], alone(batches[0]))


def test_the_divergence_is_summed_over_the_last_dimension(subject_of: Callable) -> None:
    subject = subject_of("tied")
    tuned, _ = tune(subject.planned, subject.batches, loss="kl")

    def measure(graph: fx.GraphModule) -> float:
        total = 0.0
        for [q], [y] in zip(
            outputs(graph, subject.batches),
            outputs(graph, subject.batches, quantized=False),
            strict=True,
        ):
            logs = functional.log_softmax(q, -1), functional.log_softmax(y, -1)
            total += float((logs[1].exp() * (logs[1] - logs[0])).sum())
        return total

    assert measure(tuned) < measure(subject.planned)


def test_a_seed_gives_the_same_bits_and_a_run_goes_on(subject_of: Callable, tmp_path: Path) -> None:
    subject = subject_of("resnet_onnxruntime")
    runs = [
        tune(subject.planned, subject.batches, units=units)
        for units in (Units(), Units(tmp_path, {}), Units(tmp_path, {}))
    ]
    for graph, done in runs[1:]:
        assert done == runs[0][1]
        for name, tensor in runs[0][0].state_dict().items():
            assert torch.equal(graph.state_dict()[name], tensor), name


def test_a_float_plan_has_nothing_to_tune(plan_of: Callable) -> None:
    batches = [torch.randn(3, 4)]
    subject = plan_of(nn.Linear(4, 2), batches, ("fp32",))
    assert tune(subject.planned, batches)[1] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1; found 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive finite number; found 0.0"),
        ({"learning_rate": float("nan")}, "found nan"),
        ({"loss": "l1"}, "no loss 'l1'; there are kl and mse"),
    ],
)
def test_illegal_options_are_refused(subject_of: Callable, options: dict, message: str) -> None:
    subject = subject_of("conv")
    with pytest.raises(FxmpqError, match=message):
        tune(subject.planned, subject.batches, **options)


def test_what_it_did_is_one_entry_for_the_model(subject_of: Callable) -> None:
    subject = subject_of("conv")
    [entry] = tune(subject.planned, subject.batches)[1]
    assert isinstance(entry, Refinement)
    assert (entry.method, entry.layer) == ("bias_tuning", "")
