"""What a calibrated graph has, and a planned one: ranges, scales, codes, shifts and choices."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.legality.prepared import OFF, QUANTIZED, active_of
from fxmpq.graph.legality.rule import Breaches, Rule, Subject
from fxmpq.quantizers.codes import code_dtype
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.scales import scale_shape


def _calibration(subject: Subject) -> Breaches:
    if not subject.state.calibrated:
        yield "the state says that it is not calibrated"


def _ranges(subject: Subject) -> Breaches:
    for name in subject.calls:
        module = subject.modules[name]
        for entry in module.formats if isinstance(module, ActivationQuantizer) else ():
            assert isinstance(module, ActivationQuantizer)
            found = module.ranges.get(entry.name)
            if entry.dynamic is not None:
                if found is not None:
                    yield f"quantizer {name!r} has a range of {entry.name}, which finds its own"
            elif found is None:
                yield f"quantizer {name!r} lacks a range of {entry.name}"
            elif not 0 < found.scale < math.inf:
                yield f"quantizer {name!r} has the scale {found.scale} for {entry.name}"
            elif not _has_zero(entry, found.zero_point):
                yield f"quantizer {name!r} has its zero outside of {entry.name}"
            elif module.is_symmetric and not _is_centred(entry, found.zero_point):
                yield f"quantizer {name!r} is symmetric, with {found.zero_point} for {entry.name}"


def _shared_ranges(subject: Subject) -> Breaches:
    for names in subject.state.shared_ranges:
        modules = [subject.modules.get(name) for name in names]
        for name, module in zip(names, modules, strict=True):
            if not isinstance(module, ActivationQuantizer):
                yield f"there is no activation quantizer {name!r} to share a range"
        found = [module for module in modules if isinstance(module, ActivationQuantizer)]
        formats = {entry.name for module in found for entry in module.formats}
        for entry in sorted(formats):
            if len({module.ranges[entry] for module in found if entry in module.ranges}) > 1:
                yield f"quantizers {', '.join(names)} have several ranges of {entry}"


def _has_zero(number_format: NumberFormat, zero_point: int) -> bool:
    if not number_format.is_integer:
        return zero_point == 0
    return number_format.qmin <= zero_point <= number_format.qmax


def _is_centred(number_format: NumberFormat, zero_point: int) -> bool:
    return not number_format.is_integer or zero_point == 1 << (number_format.bits - 1)


def _scales(subject: Subject) -> Breaches:
    for name, quantizer, weight in _weights(subject):
        for entry in quantizer.formats:
            scale = getattr(quantizer, f"scale_{entry.name}", None)
            expected = scale_shape(tuple(weight.shape), quantizer.axis, entry.granularity)
            if not isinstance(scale, Tensor):
                yield f"quantizer {name!r} lacks scale_{entry.name}"
            elif tuple(scale.shape) != expected:
                yield f"quantizer {name!r} has scale_{entry.name} of {list(scale.shape)}"
            elif not bool((torch.isfinite(scale) & (scale > 0)).all()):
                yield f"quantizer {name!r} has a value in scale_{entry.name} that is no scale"


def _codes(subject: Subject) -> Breaches:
    for name, quantizer, weight in _weights(subject):
        for entry in quantizer.formats:
            codes = quantizer.stored_codes(entry)
            if codes is None:
                continue
            if codes.shape != weight.shape or codes.dtype is not code_dtype(entry):
                yield f"quantizer {name!r} has codes_{entry.name} that do not fit its weight"
            elif codes.numel() and not _is_within(codes, entry):
                yield f"quantizer {name!r} has a code that {entry.name} has not"


def _is_within(codes: Tensor, number_format: NumberFormat) -> bool:
    low, high = 0, (1 << number_format.bits) - 1
    if number_format.is_integer:
        low, high = number_format.qmin, number_format.qmax
    return low <= int(codes.min()) and int(codes.max()) <= high


def _weights(subject: Subject) -> list[tuple[str, WeightQuantizer, Tensor]]:
    found = []
    for name, node in subject.calls.items():
        module, weight = subject.modules[name], subject.stored(node.args[0])
        if isinstance(module, WeightQuantizer) and weight is not None:
            found.append((name, module, weight))
    return found


def _shifts(subject: Subject) -> Breaches:
    for _, layer in subject.layers:
        correction = subject.modules.get(layer.bias_correction or "")
        if not isinstance(correction, BiasCorrection):
            continue
        channels = layer.weight_shape[layer.channel_axis]
        for name, shift in correction.named_buffers():
            if shift.dim() != 1 or shift.numel() % channels or not bool(shift.isfinite().all()):
                yield f"layer {layer.name!r} has a {name} that is none of {channels} channels"


def _choices(subject: Subject) -> Breaches:
    groups = {group.name: group for group in subject.state.groups}
    choices = subject.state.choices
    for name in sorted(groups.keys() ^ choices.keys()):
        what = "has no choice" if name in groups else "is chosen for, and is none"
        yield f"group {name!r} {what}"
    for name in sorted(groups.keys() & choices.keys()):
        if choices[name] not in map(str, groups[name].candidates):
            yield f"group {name!r} has no candidate {choices[name]}"


def _active(subject: Subject) -> Breaches:
    for group in subject.state.groups:
        chosen = Precision.parse(subject.state.choices[group.name])
        expected: dict[str, object] = {
            name: None if _leaves_alone(subject.modules.get(name), chosen) else chosen.activation
            for name in group.activation_quantizers
        }
        for layer in group.layers:
            for module in filter(None, (layer.weight_quantizer, layer.bias_correction)):
                expected[module] = chosen.weight
        for name, number_format in expected.items():
            if active_of(subject.modules.get(name)) != number_format:
                yield f"quantizer {name!r} is not at its group's {chosen}"


def _leaves_alone(module: nn.Module | None, chosen: Precision) -> bool:
    return isinstance(module, ActivationQuantizer) and module.leaves_alone(chosen.activation)


CALIBRATION = Rule("calibrated", "the state says so", _calibration)
RANGES = Rule(
    "ranges",
    "each activation quantizer has a positive scale and a zero per format that is not dynamic",
    _ranges,
)
SHARED_RANGES = Rule(
    "shared ranges", "quantizers that share a range have the same one", _shared_ranges
)
SCALES = Rule("scales", "each weight quantizer has positive scales of its shape", _scales)
CODES = Rule("codes", "stored codes have their weight's shape, and the format has them", _codes)
SHIFTS = Rule("shifts", "bias shifts are finite, one per channel", _shifts)
CHOICES = Rule("choices", "each group has one of its candidates", _choices)
ACTIVE = Rule("active", "each quantizer is at the precision of its group", _active)

_FOUND = (CALIBRATION, RANGES, SHARED_RANGES, SCALES, CODES, SHIFTS)
CALIBRATED = (*QUANTIZED, *_FOUND, OFF)
PLANNED = (*QUANTIZED, *_FOUND, CHOICES, ACTIVE)
