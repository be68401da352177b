"""Fit: train a trainable graph on a list of batches through a Lightning `Trainer`."""

from __future__ import annotations

import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import graph_device
from fxmpq.quantizers.learned import LearnedQuantizer
from fxmpq.quantizers.planned import PlannedQuantizer
from fxmpq.training.loss import LossFunction, check_loss, loss_value, on_device
from fxmpq.training.trainable import clamp_steps

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

Passes = Callable[[], Iterable[object]]
"""Switches a graph's quantizers before each of the passes whose gradients make one step."""

_MOMENTUM = 0.9
_LARGEST_GRADIENT = 1.0


def fit(
    graph: fx.GraphModule,
    batches: Sequence[object],
    *,
    loss: LossFunction,
    epochs: int,
    learning_rate: float,
    weight_decay: float = 2.5e-5,
    adaptive: bool = False,
    step_rate: float | None = None,
    passes: Passes | None = None,
    seed: int = 0,
    shown: bool = False,
) -> None:
    """Train the weights and steps of a trainable graph in place, on the graph's device.

    Stochastic gradient descent with momentum 0.9, or Adam, its learning rate falling to 0 along a
    cosine, one optimizer step a batch; the batches come in a new order each epoch. Gradients are
    clipped by value to [-1, 1], a parameter whose gradient is exactly zero is left alone (no
    momentum, no weight decay), and learned steps are kept within their bounds. The `Trainer` logs
    nothing and writes no files. Random numbers that the loss draws from torch are seeded too, and
    the global generators are put back, whatever happens. On a CPU the same seed gives the same
    bits; on a GPU as far as its kernels do.

    Cost: `epochs * len(batches) * passes` forward and backward passes.

    Args:
        graph: From `trainable`.
        batches: What `loss` takes.
        loss: `loss(graph, batch)`, a scalar.
        epochs: How often the batches are gone through; at least 1.
        learning_rate: Where the cosine begins; positive.
        weight_decay: Of every parameter.
        adaptive: Whether Adam takes the steps.
        step_rate: Where the cosine of the quantizers' parameters begins; `learning_rate` if `None`.
        passes: Each batch is run once per item that `passes()` yields, with the graph as it then
            is, and the gradients add up; once if `None`.
        seed: Of the order and of what the loss draws.
        shown: Whether to show a progress bar, when standard error is a terminal.

    Raises:
        FxmpqError: If an option is out of range, or the loss is no finite scalar with a gradient.
        KeyboardInterrupt: If interrupted; the handler of SIGINT is put back.
    """
    check_training(batches, loss=loss, epochs=epochs, learning_rate=learning_rate)
    device = graph_device(graph)
    with torch.inference_mode(False), torch.enable_grad(), _seeded(seed), _quiet():
        kind = torch.optim.Adam if adaptive else partial(torch.optim.SGD, momentum=_MOMENTUM)
        rates = (learning_rate, learning_rate if step_rate is None else step_rate)
        optimizer = kind(_parameter_groups(graph, *rates), weight_decay=weight_decay)
        module = _learning(graph, loss, optimizer, passes)
        try:
            _run(_trainer(device, epochs, shown), module, _Shuffled(batches, seed))
        finally:
            # Lightning leaves the module in training mode on the CPU, with its last gradients.
            graph.to(device).eval().zero_grad(set_to_none=True)


def check_training(
    batches: Sequence[object], *, loss: LossFunction, epochs: int, learning_rate: float
) -> None:
    """Refuse what cannot be trained with, before anything runs.

    Raises:
        FxmpqError: Naming the option, what was found and what is legal.
    """
    check_loss(loss)
    if not batches:
        raise FxmpqError("there is nothing to train on; pass at least one batch of what loss takes")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise FxmpqError(f"epochs is {epochs!r}; it must be a whole number, at least 1")
    is_number = isinstance(learning_rate, (int, float)) and not isinstance(learning_rate, bool)
    if not (is_number and math.isfinite(learning_rate) and learning_rate > 0):
        raise FxmpqError(
            f"learning_rate is {learning_rate!r}; it must be positive and finite, and a number"
        )


def finite_loss(loss: LossFunction, graph: fx.GraphModule, batch: object) -> Tensor:
    """The loss of one batch, moved to the graph's device, checked.

    Raises:
        FxmpqError: If it is no scalar tensor, or is NaN or infinite.
    """
    found = loss_value(loss, graph, on_device(batch, graph_device(graph)))
    if not bool(torch.isfinite(found)):
        raise FxmpqError(
            f"the loss became {float(found.detach())}; lower learning_rate, or check the batches "
            "and labels"
        )
    return found


def _check_gradient(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise FxmpqError(
            "the loss has no gradient with respect to the model's outputs, so nothing can be "
            "trained with it; compute it from the outputs with differentiable operators, and "
            "neither .item(), .detach() nor torch.no_grad()"
        )


class _Shuffled:
    """Batches in a new order at each iteration, from a generator of its own."""

    def __init__(self, batches: Sequence[object], seed: int) -> None:
        self._batches = batches
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[object]:
        for index in torch.randperm(len(self._batches), generator=self._generator).tolist():
            yield self._batches[index]


def _learning(
    graph: fx.GraphModule,
    loss: LossFunction,
    optimizer: torch.optim.Optimizer,
    passes: Passes | None,
) -> LightningModule:
    """Wrap a graph for the `Trainer`; optimization is manual, as several passes make a step."""
    from lightning.pytorch import LightningModule

    class Learning(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.graph = graph.train()

        def training_step(self, batch: object) -> None:
            """Add up the gradients of the passes and take one step."""
            wrapped, schedule = self.optimizers(), self.lr_schedulers()
            assert isinstance(wrapped, torch.optim.Optimizer)
            assert isinstance(schedule, torch.optim.lr_scheduler.CosineAnnealingLR)
            wrapped.zero_grad(set_to_none=True)
            for _ in [None] if passes is None else passes():
                found = finite_loss(loss, graph, batch)
                _check_gradient(found)
                self.manual_backward(found)
            self.clip_gradients(wrapped, _LARGEST_GRADIENT, "value")
            for parameter in graph.parameters():
                if parameter.grad is not None and not parameter.grad.any():
                    parameter.grad = None
            wrapped.step()
            schedule.step()
            clamp_steps(graph)

        def transfer_batch_to_device(self, batch: object, *_: object, **_more: object) -> object:
            """Leave it to `finite_loss`, which moves no batch of the user's in place."""
            return batch

        def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
            """The optimizer, under a cosine that ends with the last batch."""
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    return Learning()


def _parameter_groups(
    graph: fx.GraphModule, learning_rate: float, step_rate: float
) -> list[dict[str, object]]:
    """All trained parameters, those of quantizers with a learning rate of their own."""
    kinds = (LearnedQuantizer, PlannedQuantizer)
    steps = {
        id(parameter)
        for module in graph.modules()
        if isinstance(module, kinds)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    if step_rate == learning_rate:
        return [{"params": trained, "lr": learning_rate}]
    return [
        {"params": [entry for entry in trained if id(entry) not in steps], "lr": learning_rate},
        {"params": [entry for entry in trained if id(entry) in steps], "lr": step_rate},
    ]


def _trainer(device: torch.device, epochs: int, shown: bool) -> Trainer:
    from lightning.pytorch import Trainer

    is_cpu = device.type == "cpu"
    return Trainer(
        accelerator=device.type,
        devices=1 if is_cpu else [device.index or 0],
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=shown and sys.stderr.isatty(),
    )


def _run(trainer: Trainer, module: LightningModule, batches: _Shuffled) -> None:
    """Run the `Trainer`, which would end the process and ignore SIGINT on an interruption."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, batches)
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators for a while."""
    from lightning.pytorch.utilities.seed import isolate_rng

    failure: BaseException | None = None
    # isolate_rng restores nothing when an exception passes through it.
    with isolate_rng():
        torch.manual_seed(seed)
        try:
            yield
        except BaseException as error:  # noqa: BLE001  (raised again below, unchanged)
            failure = error
    if failure is not None:
        raise failure


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from telling of devices at every start, and from torch's deprecations."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(GPU|TPU) available but not used")
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
