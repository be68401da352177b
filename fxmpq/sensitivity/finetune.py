"""ALPS: what a group's lower precision costs after the whole network was trained around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, fx

from fxmpq.errors import FxmpqError, closest
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, require
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.training.fit import check_training, finite_loss, fit
from fxmpq.training.loss import LossFunction, batch_samples
from fxmpq.training.trainable import activate, begin_steps, trainable
from fxmpq.work import Work


def finetune(
    graph: fx.GraphModule,
    batches: Sequence[object],
    *,
    loss: LossFunction,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    groups: Sequence[str] | None = None,
    seed: int = 0,
    work: Work = Work(),
) -> Sensitivity:
    """Measure the loss left after training with one group lowered, for every (group, precision).

    A network with every group at its widest candidate is trained for `epochs`: the baseline, with
    learned steps (LSQ). From the baseline, one training for the same number of epochs goes on as
    it is, the reference; and one for each (group, lower candidate), with that group lowered and
    its steps begun anew:

        value(g, c) = max(0, L(trained with g at c) - L(reference))

    where `L` is the mean loss per sample over all batches after training. The widest candidate
    has the value 0. (ALPS of Bablani et al. 2023, arXiv:2301.13330, which lowers from 4 to 2 bits
    and takes the drop in accuracy.)

    Cost: `(2 + sum_g (candidates_g - 1)) * epochs` epochs of training, and a forward pass over
    the batches after all but the first. Needs labels, or whatever `loss` takes, and training, on
    a copy. The trainings of different groups do not depend on each other: several processes can
    share them by `groups`, each with a journal of its own, and `merge` joins what they found. On
    CPUs that round alike the result is the same to the last bit as that of one process.

    Args:
        graph: A calibrated graph; not changed.
        batches: What `loss` takes.
        loss: `loss(model, batch)`, the mean over the batch's samples.
        epochs: Of each training.
        learning_rate: Where the cosine begins.
        groups: Names of the groups to measure; all if `None`. The result holds only these.
        seed: Of the order of batches.
        work: Progress and journal; the reference and every (group, candidate) is a unit. A
            resumed run trains the baseline again.

    Returns:
        A sensitivity of unit `loss`.

    Raises:
        FxmpqError: If an option is out of range, a group is unknown, the loss is no finite
            scalar, or a training diverges.

    Examples:
        >>> from fxmpq.calibration.calibrate import calibrate
        >>> from fxmpq.graph.trace import trace
        >>> from fxmpq.training.loss import classification_loss
        >>> from fxmpq.steps import prepare
        >>> images = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> graph = prepare(trace(model, images), "reference", candidates=["w2a8", "w8a8"])
        >>> batches = [(images, images.argmax(1) % 2)]
        >>> graph = calibrate(graph, [images], progress=False)
        >>> found = finetune(graph, batches, loss=classification_loss)
        >>> found.value("0", "w8a8"), found.value("0", "w2a8") >= 0
        (0.0, True)
    """
    state = require(graph, stage="calibrated")
    check_training(batches, loss=loss, epochs=epochs, learning_rate=learning_rate)
    chosen = state.groups if groups is None else _named(state.groups, groups)
    values = {group.name: {str(entry): 0.0 for entry in group.candidates} for group in chosen}
    lowered = [
        (group, entry) for group in chosen for entry in group.candidates if entry != _widest(group)
    ]
    trainings = _Trainings(graph, batches, loss, epochs, learning_rate, seed)
    # The first is the reference, with no group lowered.
    units = [(None, Precision()), *lowered] if lowered else []
    reference = 0.0
    for group, precision in work.track(units, "training with one group lowered"):
        name = "reference" if group is None else f"{group.name} {precision}"
        (found,) = work.unit(name, partial(trainings.losses_after, group, precision))
        if group is None:
            reference = found
        else:
            values[group.name][str(precision)] = max(0.0, found - reference)
    return Sensitivity(values, method="finetune", fingerprint=state.fingerprint, unit="loss")


def merge(parts: Sequence[Sensitivity]) -> Sensitivity:
    """Join what several processes measured of different groups of one model.

    All must have been measured with the same options on the same batches, which a sensitivity
    does not tell.

    Args:
        parts: Of the same method, unit and model, each of other groups.

    Returns:
        A sensitivity of all groups, in the order of the parts.

    Raises:
        FxmpqError: If there are no parts, they differ in method, unit or model, two hold the same
            group, or one holds interactions, which cannot be joined.

    Examples:
        >>> parts = [Sensitivity({"a": {"w8a8": 0.1}}), Sensitivity({"b": {"w8a8": 0.2}})]
        >>> merge(parts).values
        {'a': {'w8a8': 0.1}, 'b': {'w8a8': 0.2}}
    """
    if not parts:
        raise FxmpqError("there is nothing to merge; pass at least one sensitivity")
    first = parts[0]
    values: dict[str, Mapping[str, float]] = {}
    for part in parts:
        for what in ("method", "unit", "fingerprint"):
            found, expected = getattr(part, what), getattr(first, what)
            if found != expected:
                raise FxmpqError(
                    f"these sensitivities differ in {what}: {expected!r} and {found!r}; merge "
                    "parts of one measurement"
                )
        if part.projections is not None:
            raise FxmpqError(
                "a sensitivity with interactions cannot be merged; measure all groups at once"
            )
        twice = [name for name in part.values if name in values]
        if twice:
            raise FxmpqError(f"group {twice[0]!r} is in two of the parts; give each to one process")
        values.update(part.values)
    return Sensitivity(values, method=first.method, fingerprint=first.fingerprint, unit=first.unit)


class _Trainings:
    """One trainable graph, brought back to the trained baseline before each training."""

    def __init__(
        self,
        graph: fx.GraphModule,
        batches: Sequence[object],
        loss: LossFunction,
        epochs: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self._graph = trainable(graph)
        self._groups = require(graph, stage="calibrated").groups
        self._batches = batches
        self._loss = loss
        self._epochs = epochs
        self._learning_rate = learning_rate
        self._seed = seed

    def losses_after(
        self, group: Group | None = None, precision: Precision = Precision()
    ) -> list[float]:
        """The mean loss per sample, one number, after training on with one group lowered."""
        baseline = self._baseline
        self._widen()
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self._graph.named_parameters():
                parameter.copy_(baseline[name])
        if group is not None:
            activate(self._graph, group, precision)
            begin_steps(self._graph, [group], self._run_first)
        self._fit(self._seed + 1)
        total, samples = 0.0, 0
        with torch.inference_mode(False), torch.no_grad():
            for batch in self._batches:
                count = batch_samples(batch)
                total += count * float(finite_loss(self._loss, self._graph, batch))
                samples += count
        return [total / samples]

    @cached_property
    def _baseline(self) -> dict[str, Tensor]:
        """Parameters after the training with every group at its widest candidate."""
        begin_steps(self._graph, self._groups, self._run_first)
        self._widen()
        self._fit(self._seed)
        return {
            name: parameter.detach().clone() for name, parameter in self._graph.named_parameters()
        }

    def _widen(self) -> None:
        for group in self._groups:
            activate(self._graph, group, _widest(group))

    def _run_first(self) -> Tensor:
        return finite_loss(self._loss, self._graph, self._batches[0])

    def _fit(self, seed: int) -> None:
        fit(
            self._graph,
            self._batches,
            loss=self._loss,
            epochs=self._epochs,
            learning_rate=self._learning_rate,
            seed=seed,
        )


def _widest(group: Group) -> Precision:
    return max(group.candidates, key=lambda entry: entry.sort_key)


def _named(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    if isinstance(names, str):
        raise FxmpqError(f"groups is {names!r}; give a sequence of names: [{names!r}]")
    if not names:
        raise FxmpqError("groups is empty; name at least one group, or leave it out for all")
    known = {group.name: group for group in groups}
    for position, name in enumerate(names):
        if name not in known:
            raise FxmpqError(f"no group {name!r}; closest: {closest(name, known)}")
        if name in names[:position]:
            raise FxmpqError(f"groups names {name!r} twice; name each group once")
    return [known[name] for name in names]
