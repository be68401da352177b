"""What fxmpq does with one small architecture, stage by stage: a row of the coverage table."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from _coverage_row import AGREEMENT_DB, Row
from _small_models import Architecture, Inputs
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxmpq
from fxmpq.graph.batches import fixed_size
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import state_of
from fxmpq.graph.weight_share import weight_share
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.target import agreement_db

Result = TypeVar("Result")

BUDGET = "weights=15%"
CANDIDATES = {"reference": ("w2a8", "w4a8", "w8a8"), "onnxruntime": None}
UNIFORM = {"w16a16": 60.0, "w8a8": 20.0}
CALIBRATION_BATCHES = 3
SAMPLES = 4
OTHER_SAMPLES = 3
SHORTER = 12


class Check:
    """Takes one architecture through all stages.

    Args:
        name: As transformers' `model_type`.
        architecture: Its small configuration.
        targets: What to plan and convert for.
    """

    def __init__(
        self, name: str, architecture: Architecture, targets: Sequence[str] = tuple(CANDIDATES)
    ) -> None:
        self.row = Row(name)
        self.architecture = architecture
        self.targets = targets

    def run(self) -> Row:
        """Run every stage whose input is there, and return what was found."""
        try:
            model = self._stage("build", lambda: self.architecture.build(self.row.name))
            self.row.parameters = sum(parameter.numel() for parameter in model.parameters())
            self.row.has_batch_norm = any(
                "BatchNorm" in type(module).__name__ for module in model.modules()
            )
            graph = self._stage("trace", lambda: fxmpq.trace(model, self._batch(0, SAMPLES)))
        except StageError:
            return self.row
        self._read_sizes(graph)
        self._follow(lambda: self._count_weights(graph))
        self._follow(lambda: self._compare_off(model, graph))
        self._follow(lambda: self._compare_uniform(graph))
        for target in self.targets:
            self._follow(lambda target=target: self._plan(target, graph))
        return self.row

    def _follow(self, work: Callable[[], None]) -> None:
        """Go on after a failure, which is in the row."""
        try:
            work()
        except StageError:
            return

    def _stage(self, stage: str, work: Callable[[], Result]) -> Result:
        """Do a piece of a stage: add its time, and keep its error."""
        start = time.process_time()
        try:
            return work()
        except Exception as error:
            self.row.errors[stage] = f"{type(error).__name__}: {error}"
            raise StageError(stage) from error
        finally:
            spent = time.process_time() - start
            self.row.seconds[stage] = self.row.seconds.get(stage, 0.0) + spent

    def _batch(self, seed: int, samples: int) -> Inputs:
        return self.architecture.inputs(samples, torch.Generator().manual_seed(seed))

    def _samples(self, wanted: int) -> int:
        return wanted if self.row.batch == "any" else int(self.row.batch)

    def _calibration(self) -> list[Inputs]:
        samples = self._samples(SAMPLES)
        return [self._batch(1 + seed, samples) for seed in range(CALIBRATION_BATCHES)]

    def _other(self) -> Inputs:
        """A batch of another size, and with shorter sequences, as far as the trace allows."""
        batch = self._batch(99, self._samples(OTHER_SAMPLES))
        if self.row.sequence != "any":
            return batch
        return {
            name: value if value.is_floating_point() else value[:, :SHORTER]
            for name, value in batch.items()
        }

    def _read_sizes(self, graph: fx.GraphModule) -> None:
        """Which sizes the trace left free; lengths are those of integer inputs."""
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        self.row.batch = _size(values[0].shape[0])
        lengths = [_size(v.shape[1]) for v in values if not v.is_floating_point() and v.dim() > 1]
        fixed = [length for length in lengths if length != "any"]
        self.row.sequence = next(iter([*fixed, *lengths]), "")

    def _count_weights(self, graph: fx.GraphModule) -> None:
        share = self._stage("count weights", lambda: weight_share(graph))
        self.row.quantizable, self.row.weights = share.quantizable, share.total
        left: Counter[str] = Counter()
        for _, elements, reason in share.left:
            left[reason] += elements
        self.row.left = dict(left)

    def _compare_off(self, model: nn.Module, graph: fx.GraphModule) -> None:
        other = self._other()
        prepared = self._stage("prepare", lambda: fxmpq.prepare(graph, "reference"))
        expected = self._stage("run", lambda: _outputs(model, other))
        traced, found = (
            self._stage("run", lambda one=one: _outputs(one, other)) for one in (graph, prepared)
        )
        self.row.equals_trace = _equal(traced, found)
        self.row.off_db = math.inf if _equal(expected, found) else agreement_db(expected, found)

    def _compare_uniform(self, graph: fx.GraphModule) -> None:
        batches = self._calibration()
        calibrated = self._calibrate(graph, "reference", tuple(UNIFORM))
        signal = self._stage("simulate", lambda: _flat_outputs(graph, batches))
        for precision, least in UNIFORM.items():
            simulated = self._stage("simulate", lambda p=precision: _uniform(calibrated, p))
            found = self._stage("simulate", lambda s=simulated: _flat_outputs(s, batches))
            self.row.uniform_db[precision] = agreement_db(signal, found)
            if not self.row.uniform_db[precision] >= least:
                self.row.worst[precision] = self._stage(
                    "find worst", lambda p=precision: _worst(calibrated, batches, p)
                )

    def _calibrate(
        self, graph: fx.GraphModule, target: str, candidates: Sequence[str] | None
    ) -> fx.GraphModule:
        prepared = self._stage(
            "prepare", lambda: fxmpq.prepare(graph, target, candidates=candidates)
        )
        batches = self._calibration()
        return self._stage("calibrate", lambda: fxmpq.calibrate(prepared, batches, progress=False))

    def _plan(self, target: str, graph: fx.GraphModule) -> None:
        calibrated = self._calibrate(graph, target, CANDIDATES[target])
        batches = self._calibration()
        sensitivity = self._stage(
            "measure", lambda: fxmpq.measure(calibrated, batches, progress=False)
        )
        plan = self._stage(
            "solve", lambda: fxmpq.solve(sensitivity, fxmpq.cost(calibrated), BUDGET)
        )
        planned = self._stage("simulate", lambda: fxmpq.apply(calibrated, plan))
        found = self._stage("simulate", lambda: _flat_outputs(planned, batches))
        self.row.shares[target] = plan.relative["weights"]
        self.row.plan_db[target] = agreement_db(_flat_outputs(graph, batches), found)
        converted = self._stage(f"convert, {target}", lambda: fxmpq.convert(planned, verify=False))
        other = self._other()
        expected = self._stage("simulate", lambda: _flat_outputs(planned, [other]))
        outputs = self._stage(f"run, {target}", lambda: list(converted.run(other)))
        self.row.agreement_db[target] = agreement_db(expected, outputs)
        if not self.row.agreement_db[target] >= AGREEMENT_DB:
            layers = self._stage(
                "compare layers", lambda: layer_agreements(planned, converted, other)
            )
            worst = min(layers, key=lambda layer: layer.sqnr_db, default=None)
            if worst is not None:
                self.row.layer_db[target] = (worst.layer, worst.sqnr_db)


class StageError(Exception):
    """A stage failed; what it raised is in the row."""


def _size(size: int | torch.SymInt) -> str:
    fixed = fixed_size(size)
    return "any" if fixed is None else str(fixed)


def _outputs(model: nn.Module, batch: Inputs) -> list[Tensor]:
    """The tensors in what a model returns."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _flat_outputs(graph: fx.GraphModule, batches: Sequence[Inputs]) -> list[Tensor]:
    leaves = [leaf for batch in batches for leaf in run_batch(graph, batch)]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _equal(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return len(expected) == len(found) and all(map(torch.equal, expected, found))


def _candidate(names: Sequence[str], precision: str) -> str:
    """The candidate that a group takes when everything is at one precision."""
    wanted = fxmpq.Precision.parse(precision)
    legal = [str(one) for one in (wanted, wanted.weight_only, fxmpq.Precision())]
    return next(name for name in legal if name in names or name == legal[-1])


def _uniform(calibrated: fx.GraphModule, precision: str) -> fx.GraphModule:
    groups = state_of(calibrated).groups
    return fxmpq.apply(
        calibrated,
        {group.name: _candidate([*map(str, group.candidates)], precision) for group in groups},
    )


def _worst(
    calibrated: fx.GraphModule, batches: Sequence[Inputs], precision: str
) -> tuple[str, float]:
    """The group that disturbs the output most by itself, and the output's SQNR then."""
    found = fxmpq.measure(calibrated, batches, method="sqnr", progress=False)
    chosen = {
        group: _candidate([*row], precision)
        for group, row in found.values.items()
        if _candidate([*row], precision) in row
    }
    worst = max(chosen, key=lambda group: found.value(group, chosen[group]))
    return worst, found.sqnr_db(worst, chosen[worst])
