"""What a graph has when its training begins."""

from __future__ import annotations

import torch

from fxmpq.graph.legality.prepared import GROUPED, active_of
from fxmpq.graph.legality.rule import Breaches, Rule, Subject
from fxmpq.quantizers.learned import LearnedQuantizer
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.planned import PlannedQuantizer


def _trains(subject: Subject) -> Breaches:
    for name, parameter in subject.graph.named_parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            yield f"parameter {name!r} gets no gradient"


def _learned(subject: Subject) -> Breaches:
    for name in subject.calls:
        module = subject.modules.get(name)
        is_fixed = isinstance(module, (ActivationQuantizer, WeightQuantizer, BiasCorrection))
        if is_fixed and active_of(module) is not None:
            yield f"{name!r} is on, and does not learn"


def _steps(subject: Subject) -> Breaches:
    for name in subject.calls:
        module = subject.modules.get(name)
        if isinstance(module, LearnedQuantizer):
            steps = [module.step(entry).detach() for entry in module.formats]
        elif isinstance(module, PlannedQuantizer):
            steps = [module.step.detach()]
        else:
            continue
        if not all(bool((torch.isfinite(step) & (step > 0)).all()) for step in steps):
            yield f"{name!r} has a step that is not positive"


TRAINS = Rule("parameters train", "every floating-point parameter gets a gradient", _trains)
LEARNED = Rule("quantizers learn", "no quantizer is on that does not learn", _learned)
STEPS = Rule("steps", "learned steps are positive", _steps)

TRAINABLE = (*GROUPED, TRAINS, LEARNED, STEPS)
