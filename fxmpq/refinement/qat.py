"""QAT: train a planned graph, weights, biases and steps, and freeze what it learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch, call_arguments, flat_inputs, graph_device
from fxmpq.graph.run import float_outputs
from fxmpq.graph.state import Refinement
from fxmpq.refinement.relative_error import relative_error
from fxmpq.refinement.units import Units
from fxmpq.training.distillation import Distillation, check_distillation
from fxmpq.training.fit import check_training, fit
from fxmpq.training.freeze import freeze
from fxmpq.training.loss import LossFunction, check_was_run, loss_value, on_device
from fxmpq.training.planned import check_planned, float_copy, trainable_plan

_COMPARED_BATCHES = 8
_KEPT = "qat_kept"


def qat(
    graph: fx.GraphModule,
    batches: Sequence[object],
    *,
    units: Units,
    loss: LossFunction | None = None,
    epochs: int = 1,
    learning_rate: float = 2e-4,
    step_rate: float = 1e-3,
    distillation: float = 0.5,
    seed: int = 0,
) -> list[Refinement]:
    """Train a planned graph at its own precisions, then freeze it (quantization-aware training).

    Weights, biases and quantization steps learn together: a step for each scale of a weight and
    one for each activation, with the gradients of LSQ (Esser et al. 2020, arXiv:1902.08153), from
    where calibration or an earlier refinement put them. Codes do not train: where a refinement
    stored others than the nearest, as `gptq` does, the weight begins at what they stand for.
    Adam, one step a batch, its learning rates falling to 0 along a cosine; the loss is

        (1 - distillation) * loss(model, batch) + distillation * KL(float logits || logits)

    the float logits being those of the same graph before training, every quantizer off. Then the
    trained weights and biases replace the float ones, the steps become scales and ranges, and the
    codes are stored: the graph computes what was trained, bit for bit but for biases that the
    target stores as integers, and converts as ever.

    With `distillation=1` **no labels are needed**: leave `loss` out and pass batches as the model
    takes them. Otherwise batches are what `loss` takes, labels included.

    Cost: for each epoch and batch a forward and a backward pass, about three float passes and one
    for the float logits; nearly half as much again for rounding.

    Args:
        graph: Planned; its weights, biases and quantizers are replaced.
        batches: To train on, in a new order each epoch.
        units: Shows progress; with a folder the training, once finished, is kept as a whole.
        loss: `loss(model, batch)`, a scalar; `None` only with `distillation=1`.
        epochs: How often the batches are gone through.
        learning_rate: Of weights and biases, where the cosine begins.
        step_rate: Of the steps, as a share of themselves.
        distillation: Share of the divergence from the float logits in the loss, 0 to 1.
        seed: Of the order of the batches, and of what the loss draws.

    Returns:
        One entry for the whole model: the relative squared error of its outputs against the float
        model's on the first 8 batches. With labels it may grow while the accuracy does too.

    Raises:
        FxmpqError: If an option is out of range, there is no plan, or no loss where one is
            needed; if the loss is no finite scalar.
        BatchError: If batches without a loss are not what the model takes.
    """
    check_planned(graph)
    check_distillation(distillation)
    _check_rate(step_rate)
    task = _without_labels if loss is None else loss
    check_training(batches, loss=task, epochs=epochs, learning_rate=learning_rate)
    if loss is None:
        _check_unlabelled(graph, batches, distillation)
    learning, teacher = trainable_plan(graph), float_copy(graph)
    kept = nn.Module()
    graph.add_module(_KEPT, kept)

    def train() -> list[float]:
        before = _relative_error(teacher, learning, batches, task)
        fit(
            learning,
            batches,
            loss=_distilled(Distillation(learning, teacher, distillation), task, distillation),
            epochs=epochs,
            learning_rate=learning_rate,
            adaptive=True,
            step_rate=step_rate,
            seed=seed,
            shown=units.shown,
        )
        for index, tensor in enumerate(learning.state_dict().values()):
            kept.register_buffer(f"tensor_{index}", tensor)
        return [before, _relative_error(teacher, learning, batches, task)]

    try:
        before, after = units.unit("qat", graph, [_KEPT], train)
    finally:
        graph.delete_submodule(_KEPT)
    tensors = dict(kept.named_buffers())
    names = enumerate(learning.state_dict())
    learning.load_state_dict({name: tensors[f"tensor_{index}"] for index, name in names})
    freeze(learning, graph)
    return [Refinement("qat", "", before, after)]


def _distilled(distillation: Distillation, task: LossFunction, share: float) -> LossFunction:
    """The mixed loss; the teacher is not run where it has no share."""
    if share == 0:
        return task

    def mixed(model: nn.Module, batch: object) -> Tensor:
        with distillation.listening():
            return distillation.mixed(loss_value(task, model, batch))

    return mixed


def _without_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on what it takes; there is no task."""
    args, kwargs = call_arguments(batch)
    model(*args, **kwargs)
    return torch.zeros(())


def _check_unlabelled(
    graph: fx.GraphModule, batches: Sequence[object], distillation: float
) -> None:
    if distillation != 1:
        raise FxmpqError(
            f"distillation={distillation:g} mixes in a loss from labels, and there is no loss; "
            "pass loss=..., a callable loss(model, batch), or train without labels with "
            "distillation=1 on batches as the model takes them"
        )
    for batch in batches:
        flat_inputs(graph, batch)  # type: ignore[arg-type]  # raises for what is no batch


def _relative_error(
    teacher: fx.GraphModule,
    student: fx.GraphModule,
    batches: Sequence[object],
    task: LossFunction,
) -> float:
    """`sum (y_q - y)^2 / sum y^2` of the floating-point outputs on the first batches."""
    with torch.no_grad():
        return relative_error(
            lambda index: _outputs(student, batches[index], task),
            lambda index: _outputs(teacher, batches[index], task),
            min(len(batches), _COMPARED_BATCHES),
        )


def _outputs(graph: fx.GraphModule, batch: object, task: LossFunction) -> Tensor:
    """All that a graph returns while the task runs it on a batch, flat."""
    seen: list[Tensor] = []

    def look(_: nn.Module, _inputs: object, outputs: object) -> None:
        seen.extend(tensor.double().flatten() for tensor in float_outputs(outputs))

    handle = graph.register_forward_hook(look)
    try:
        task(graph, on_device(batch, graph_device(graph)))
    finally:
        handle.remove()
    check_was_run(bool(seen))
    return torch.cat(seen)


def _check_rate(step_rate: float) -> None:
    is_number = isinstance(step_rate, (int, float)) and not isinstance(step_rate, bool)
    if not (is_number and math.isfinite(step_rate) and step_rate > 0):
        raise FxmpqError(f"step_rate is {step_rate!r}; it must be positive and finite, a number")
