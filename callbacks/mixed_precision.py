"""The callback that quantizes a LightningModule's network within a Trainer run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxmpq.callbacks.calibration_source import CalibrationSource
from fxmpq.callbacks.capture import capture_batches, undisturbed
from fxmpq.callbacks.labels import step_batches, with_step_losses
from fxmpq.callbacks.options import check_options, own_journal
from fxmpq.callbacks.publish import publish_plan, shows_progress
from fxmpq.callbacks.slot import NetworkSlot
from fxmpq.callbacks.strategies import check_strategy, share_plan
from fxmpq.callbacks.surgery import find_submodule
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.candidates import read_candidates
from fxmpq.graph.patterns import Ties, read_exclude, read_ties
from fxmpq.pipeline import quantize
from fxmpq.quantized import Quantized
from fxmpq.refinement.refine import check_refinement
from fxmpq.sensitivity.measure import reads_labels
from fxmpq.solver.budget import Budget
from fxmpq.solver.plan import Plan
from fxmpq.solver.programs import check_program, program_of
from fxmpq.steps import further_of
from fxmpq.targets.registry import get_target
from fxmpq.targets.target import Target


class MixedPrecisionCallback(Callback):
    """Quantizes one sub-module of a LightningModule and puts the simulated graph in its place.

    In `trainer.validate`, `trainer.test` and `trainer.predict` it works before the first
    batch, so that the run's metrics are those of the quantized model; in `trainer.fit` it
    works when training has ended. It takes calibration batches, runs the module's own step on
    them up to the point where the sub-module is called, calls `fxmpq.quantize` on that
    sub-module with what it was called with, and replaces that one attribute. `plan.json` is
    written to the run's log folder, and the plan's costs go to the loggers.

    Calibration batches are what the module's loaders yield. They come from `calibration`,
    else from `trainer.datamodule.train_dataloader()`, never from the run's own loaders. The
    step is left when it first calls the sub-module: metrics and `self.log` are not touched.

    A run that follows on the same module goes on with the quantized network; if it restores a
    checkpoint or trains, it does so with the float network, which is then quantized anew.
    Checkpoints hold the float network's weights; only a `ModelCheckpoint` with both
    `save_weights_only` and `save_last`, which asks no callback, may write the graph's.

    With several processes (DDP), all calibrate on the first process's batches and apply its
    plan. With `ddp_spawn`, `ddp_fork` and `ddp_notebook` the callback lives on in the worker
    processes only: the plan is in `plan.json`, and `fit` is refused.

    Args:
        target: A target's name, as `reference` or `onnxruntime`, or a TOML file that describes
            one, as `npu.toml`.
        budget: As `"weights=15%"`, `"weights=1.5MB,bops=10%"`, `"avg_weight_bits=4.5"`.
        calibration: Batches as the module's step takes them, a loader for instance.
        calibration_batches: How many batches to take at most.
        module: Attribute path of the sub-module to quantize.
        candidates: Precisions to choose from, as `["w4a8", "w8a8"]`; the target's own if
            `None`.
        method: Sensitivity method, a key of `METHODS`. One that needs a loss takes it from the
            module's `training_step`; `loss="validation_step"` names another step, and
            `score="validation_step"` a step for the methods with a score. The calibration
            batches are then read with their labels.
        program: Form of the bit-width program, a key of `PROGRAMS`; the method's own if `None`.
        keep: Layers that must have a precision, as `{"classifier": "w8a8"}`; layer names are
            those within the sub-module.
        exclude: Layers that stay float.
        ties: Layers that share a precision: each entry a pattern on their names, or several.
        products: Whether products of two activations, as in attention, are quantized too.
        refine: A recipe or method of refinement, as `light` or `advanced`, which the plan's graph
            goes through on the calibration batches; `None` for none.
        report_dir: Where to write `plan.json`; `trainer.log_dir` if `None`.
        **options: Further options of `fxmpq.quantize`: `ranges`, `weight_scales`,
            `bias_correction`, `resume`, and the method's, as `probes=4, seed=1`. With several
            processes, all but the first add their rank to the name of the journal.

    Raises:
        FxmpqError: A subclass for an unusable target, budget, method, precision, option or
            calibration, on construction.
        MisconfigurationException: In `setup`, if the strategy, the module or the data
            source does not allow it.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> callback = MixedPrecisionCallback("reference", "weights=15%", calibration_batches=4)
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False)

        followed by `trainer.validate(module, datamodule)` and
        `fxmpq.convert(callback.graph_module)`.
    """

    def __init__(
        self,
        target: str | Path | Target = "onnxruntime",
        budget: str | Mapping[str, object] | Budget = "weights=15%",
        *,
        calibration: Iterable[object] | None = None,
        calibration_batches: int = 8,
        module: str = "model",
        candidates: Sequence[str | Precision] | None = None,
        method: str = "projected",
        program: str | None = None,
        keep: Mapping[str, str | Precision] | None = None,
        exclude: Sequence[str] = (),
        ties: Ties = (),
        products: bool = False,
        refine: str | None = None,
        report_dir: str | Path | None = None,
        **options: object,
    ) -> None:
        self._target = get_target(target)
        self._budget = Budget.parse(budget)
        further_of(self._target, self._budget.metrics)  # refuses what nothing here measures
        check_options(method, options)
        check_program(program or program_of(method), method=method)
        if refine is not None:
            check_refinement(refine, has_labels=False)
        self._source = CalibrationSource(calibration, calibration_batches)
        self._candidates = read_candidates(candidates)
        self._keep = {pattern: Precision.parse(entry) for pattern, entry in (keep or {}).items()}
        wanted = [*(self._candidates or ()), *self._keep.values()]
        self._target.rules.check(wanted, products=products)
        self._slot = NetworkSlot(module)
        self._method = method
        self._program = program
        self._exclude = read_exclude(exclude)
        self._ties = read_ties(ties)
        self._products = products
        self._refine = refine
        self._report_dir = report_dir
        self._options = options
        self._quantized: Quantized | None = None
        self._set_aside = False

    @property
    def quantized(self) -> Quantized:
        """Everything `fxmpq.quantize` found.

        Raises:
            FxmpqError: Before a run has quantized the module, as `plan`, `graph_module` and
                `float_module` do.
        """
        if self._quantized is None:
            raise FxmpqError(
                "nothing is quantized yet; run trainer.validate(module, datamodule), "
                "trainer.test(...) or trainer.fit(...) with this callback first (with ddp_spawn, "
                "ddp_fork and ddp_notebook only the worker processes have the result)"
            )
        return self._quantized

    @property
    def plan(self) -> Plan:
        """The precision chosen for every group, and what is known about the choice."""
        return self.quantized.plan

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph that simulates the plan, now in the sub-module's place."""
        return self.quantized.graph

    @property
    def float_module(self) -> nn.Module:
        """The sub-module that the graph replaced, unchanged."""
        self.quantized  # noqa: B018  (raises before a run)
        assert self._slot.float_network is not None
        return self._slot.float_network

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what depends on the Trainer, and put the float network back for the time being.

        Weights may be restored or trained before this run quantizes, and both need the float
        network.

        Raises:
            MisconfigurationException: If the strategy, the module or the data source does not
                allow quantization.
        """
        check_strategy(trainer.strategy, stage)
        self._set_aside = self._slot.put_float_back(pl_module)
        self._slot.remember_flags(pl_module)
        if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):
            find_submodule(pl_module, self._slot.path)  # else these later hooks may make it
        if stage == "fit" or not self._set_aside:
            self._source.check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize before `trainer.validate` sees its first batch."""
        if trainer.state.fn == "validate" and not trainer.sanity_checking:
            self._swap_in(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize before `trainer.test` sees its first batch."""
        self._swap_in(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize before `trainer.predict` sees its first batch."""
        self._swap_in(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize the trained network."""
        self._set_aside = False
        self._swap_in(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """Save the float network's weights, which the module's own class can load."""
        if self._slot.holds_graph(pl_module):
            weights = checkpoint["state_dict"]
            assert isinstance(weights, dict)
            self._slot.restore_float_weights(weights)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let what is not part of the module follow it to the device it is left on."""
        if self._slot.holds_graph(pl_module):
            self._slot.follow_device(self.quantized.calibrated)

    def _swap_in(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the graph into the module: the one set aside if it is still true, or a new one."""
        if not self._set_aside or trainer.ckpt_path is not None:
            with undisturbed(module):
                quantized = share_plan(trainer, self._quantize(trainer, module))
                publish_plan(trainer, quantized.plan, self._report_dir or trainer.log_dir)
            self._quantized = quantized
        self._set_aside = False
        self._slot.put_graph(module, self.graph_module)

    def _quantize(self, trainer: Trainer, module: LightningModule) -> Quantized:
        network = find_submodule(module, self._slot.path)
        batches = self._source.take(trainer)
        options = own_journal(self._options, trainer.global_rank)
        options = with_step_losses(self._method, options, module, self._slot.path)
        captured = capture_batches(trainer, module, self._slot.path, batches)
        placed = _shared(trainer, captured)
        labelled = None
        if reads_labels(self._method, options):
            labelled = _shared(trainer, step_batches(trainer, batches))
        return quantize(
            network,
            placed,
            target=self._target,
            budget=self._budget,
            candidates=self._candidates,
            method=self._method,
            program=self._program,
            labelled=labelled,
            keep=self._keep,
            exclude=self._exclude,
            ties=self._ties,
            products=self._products,
            refine=self._refine,
            progress=shows_progress(trainer),
            **options,  # type: ignore[arg-type]  # names checked on construction
        )


def _shared(trainer: Trainer, batches: list[Any]) -> list[Any]:
    """The first process's batches, for processes may load different data, on this one's device."""
    device = trainer.strategy.root_device
    shared = trainer.strategy.broadcast(batches)
    return [pytree.tree_map_only(Tensor, lambda t: t.to(device), batch) for batch in shared]
