"""The callback with which a Trainer trains a planned graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import fx, nn

from fxmpq.callbacks.strategies import check_strategy
from fxmpq.callbacks.surgery import replace_submodule
from fxmpq.callbacks.training_step import DistilledStep
from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.batches import graph_device
from fxmpq.graph.integer_biases import round_biases
from fxmpq.graph.state import copy_graph, require
from fxmpq.solver.plan import Plan
from fxmpq.steps import apply
from fxmpq.training.distillation import Distillation, check_distillation
from fxmpq.training.freeze import freeze
from fxmpq.training.planned import check_planned, float_copy, trainable_plan
from fxmpq.training.trainable import clamp_steps


class QuantizationAwareTraining(Callback):
    """Lets a LightningModule and its Trainer train a planned graph in the network's place.

    In `trainer.fit` it puts a trainable copy of the graph where the network is, before optimizers
    are configured: weights, biases and a quantization step for each scale, which learn with the
    gradients of LSQ (Esser et al. 2020, arXiv:1902.08153) at the plan's precisions. The module's
    own `training_step`, optimizers and losses run unchanged. When training has ended, the result
    is frozen into an ordinary planned graph, which computes what was trained bit for bit, but for
    biases that the target stores as integers, is left in the network's place and is ready for
    `fxmpq.convert`.

    The steps are learned as ratios to where they began, so that an optimizer that takes the
    weights well takes them well too; learning rates as for fine-tuning do, and one to three
    epochs. With `distillation` the loss of `training_step` is mixed with the divergence from the
    float model's logits; with `distillation=1` that alone is trained, and the step needs no
    labels, only to call the network.

    Checkpoints hold the trainable graph. A `trainer.fit(..., ckpt_path=...)` with a callback of
    the same graph and plan goes on from them, `trainer.test(..., ckpt_path=...)` and the like
    freeze what they hold. A further fit without a checkpoint goes on from the frozen graph.

    Args:
        graph: From `fxmpq.calibrate` with a `plan`, or with chosen precisions: from
            `fxmpq.apply`, `fxmpq.refine`, or another callback's `graph_module`. It must come
            from the network; it is not changed.
        plan: From `fxmpq.solve`, or precision names per group; `None` takes the graph's own.
        attribute: Attribute path of the network in the LightningModule.
        distillation: Share of the divergence from the float logits in the loss, 0 to 1. The
            float model is the graph with its quantizers off. One more float pass a step.

    Raises:
        FxmpqError: On construction, if the graph is not calibrated, has no plan, or
            `distillation` is out of range.
        MisconfigurationException: In `setup`, if the strategy or the module does not allow it.

    Examples:
        >>> import fxmpq
        >>> from lightning.pytorch import Trainer
        >>> model, batch = nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4)
        >>> graph = fxmpq.prepare(fxmpq.trace(model, batch), "reference")
        >>> graph = fxmpq.calibrate(graph, [batch], progress=False)
        >>> callback = QuantizationAwareTraining(graph, {"0": "w4a8"}, distillation=0.5)
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False)

        followed by `trainer.fit(module, loader)` and `fxmpq.convert(callback.graph_module)`.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        plan: Plan | Mapping[str, str] | None = None,
        *,
        attribute: str = "model",
        distillation: float = 0.0,
    ) -> None:
        check_distillation(distillation)
        self._planned = graph if plan is None else apply(graph, plan)
        check_planned(self._planned)
        self._attribute = attribute
        self._distillation = distillation
        self._step: DistilledStep | None = None
        self._learning: fx.GraphModule | None = None
        self._frozen: fx.GraphModule | None = None
        self._float_module: nn.Module | None = None

    @property
    def graph_module(self) -> fx.GraphModule:
        """The trained and frozen graph, which simulates the plan.

        Raises:
            FxmpqError: Before training has ended.
        """
        if self._frozen is None:
            raise FxmpqError(
                "nothing is trained yet; run trainer.fit(module, ...) with this callback to its end"
            )
        return self._frozen

    @property
    def float_module(self) -> nn.Module:
        """The network that the graph replaced, unchanged.

        Raises:
            FxmpqError: Before a run.
        """
        if self._float_module is None:
            raise FxmpqError("nothing is replaced yet; run trainer.fit(module, ...) first")
        return self._float_module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the trainable graph in the network's place, where weights may yet be restored.

        Raises:
            MisconfigurationException: If the strategy or the module does not allow it.
        """
        check_strategy(trainer.strategy, stage)
        network = self._find(pl_module)
        if stage == "fit":
            self._check_step(pl_module)
        if network is not self._learning and network is not self._frozen:
            self._float_module = network
        if stage == "fit" or self._learning is None:
            # A checkpoint overwrites all that learns, so it does not matter where it begins.
            begun = self._planned if self._frozen is None else self._frozen
            # The graph has no modes; Lightning warns of modules that are not in training mode.
            self._learning = trainable_plan(begun).train()
        replace_submodule(pl_module, self._attribute, self._learning)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the training step if there is distillation."""
        if self._distillation:
            assert self._learning is not None
            teacher = float_copy(self._planned)
            self._step = DistilledStep(Distillation(self._learning, teacher, self._distillation))
            self._step.put_on(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401  (as Lightning declares it)
        batch_idx: int,
    ) -> None:
        """Keep the steps positive."""
        assert self._learning is not None
        clamp_steps(self._learning)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what `trainer.validate` has restored."""
        if trainer.state.fn == "validate":
            self._settle(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what `trainer.test` has restored."""
        self._settle(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what `trainer.predict` has restored."""
        self._settle(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze what was trained, after the last checkpoint is written."""
        self._take_off_step()
        self._freeze(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module its own training step back; in a fit, the trainable graph stays."""
        self._take_off_step()
        if trainer.state.fn != "fit":
            self._put_back(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the trainable graph, from which training can go on, also when it is frozen."""
        if self._learning is None or self._find(pl_module) is not self._frozen:
            return
        prefix = f"{self._attribute}."
        weights: dict[str, object] = checkpoint["state_dict"]
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]
        weights.update(self._learning.state_dict(prefix=prefix))

    def _settle(self, trainer: Trainer, module: LightningModule) -> None:
        """Freeze what an evaluation has restored; without a checkpoint, undo what `setup` did."""
        if trainer.ckpt_path is None:
            self._put_back(module)
        else:
            self._freeze(module)

    def _put_back(self, module: LightningModule) -> None:
        """Put what was trained before, or else the float network, in the network's place."""
        network = self._float_module if self._frozen is None else self._frozen
        learning = self._learning
        if network is not None and learning is not None and self._find(module) is learning:
            with torch.inference_mode(False):
                # A run before this one has left it on the CPU.
                network.to(graph_device(learning))
            replace_submodule(module, self._attribute, network)

    def _freeze(self, module: LightningModule) -> None:
        """Put the frozen graph in the place of the trainable one."""
        assert self._learning is not None
        with torch.inference_mode(False):
            frozen = copy_graph(self._planned)
            freeze(self._learning, frozen)
            round_biases(frozen)
            self._frozen = frozen.to(graph_device(self._learning))
        replace_submodule(module, self._attribute, self._frozen)

    def _take_off_step(self) -> None:
        if self._step is not None:
            self._step.take_off()
            self._step = None

    def _check_step(self, module: LightningModule) -> None:
        if self._distillation and not module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(module).__name__} optimizes by hand, so its loss never passes through the "
                "callback; train with distillation=0, or with automatic_optimization=True"
            )

    def _find(self, module: LightningModule) -> nn.Module:
        """The network: the module's own, or one of this callback's graphs."""
        known: dict[str, nn.Module] = dict(module.named_modules(remove_duplicate=False))
        if not self._attribute or self._attribute not in known:
            raise MisconfigurationException(
                f"{type(module).__name__} has no sub-module {self._attribute!r} to train when its "
                f"run is set up; closest: {closest(self._attribute, [*known][1:])}. Make the "
                "network in __init__, and name it as in QuantizationAwareTraining(..., "
                "attribute='model')"
            )
        self._check_network(known[self._attribute])
        return known[self._attribute]

    def _check_network(self, network: nn.Module) -> None:
        """Refuse a network that the graph cannot have come from, by its layers' weights."""
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        layers = [
            layer
            for group in require(self._planned, stage="calibrated").groups
            for layer in group.layers
        ]
        same = [layer for layer in layers if layer.weight in shapes]
        other = [layer for layer in same if shapes[layer.weight] != layer.weight_shape]
        if other or (layers and not same):
            layer = (other or layers)[0]
            found = shapes.get(layer.weight)
            raise MisconfigurationException(
                f"the graph was traced from another network than the one at {self._attribute!r} "
                f"({type(network).__name__}): its weight {layer.weight!r} has shape "
                f"{list(layer.weight_shape)}, there it "
                f"{'is missing' if found is None else f'has {list(found)}'}"
            )
