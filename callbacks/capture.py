"""Capturing what a sub-module receives when its LightningModule processes calibration batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmpq.callbacks.surgery import find_submodule
from fxmpq.graph.batches import Batch

_SEED = 0


class _InputsCaptured(BaseException):
    """Carries a call's arguments out of the step; no `except Exception` of the user stops it."""

    def __init__(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        super().__init__()
        self.arguments = args
        self.keywords = kwargs


@contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Run a block in evaluation mode such that the surrounding run does not notice.

    Inside, the module is in eval mode, inference mode is off (tensors made under it could
    never be differentiated again), no gradients are recorded, and PyTorch's random state
    starts from a fixed seed, so that a shuffling loader gives every process and every run the
    same batches. On leaving, by an exception too, training flags, gradient and inference mode
    and the random states of PyTorch, NumPy and Python are what they were.

    Args:
        module: The LightningModule.

    Examples:
        >>> class Module(LightningModule): ...
        >>> module = Module()
        >>> with torch.inference_mode(), undisturbed(module):
        ...     module.training, torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        (False, False, False)
        >>> module.training
        True
    """
    flags = {child: child.training for child in module.modules()}
    failure: BaseException | None = None
    # isolate_rng restores nothing when an exception passes through it.
    with isolate_rng(), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(_SEED)
        module.eval()
        try:
            yield
        except BaseException as error:  # noqa: BLE001  (raised again below, unchanged)
            failure = error
    for child, flag in flags.items():
        child.training = flag
    if failure is not None:
        raise failure


def capture_batches(
    trainer: Trainer, module: LightningModule, path: str, batches: Iterable[object]
) -> list[Batch]:
    """Run a LightningModule's own step on batches and keep what a sub-module is called with.

    Each batch is moved to the device as the Trainer does, and given to the step of the run
    (`validation_step`, `test_step`, `predict_step`; after a fit the first of these that the
    module defines). The step is left as soon as it calls the sub-module for the first time,
    so neither its metrics nor its losses are reached; `self.log` before that call does
    nothing. Call it inside `undisturbed`.

    Args:
        trainer: The running Trainer.
        module: Its LightningModule.
        path: Attribute path of the sub-module.
        batches: What the module's loaders yield.

    Returns:
        One call per batch: positional arguments as a tuple, or keyword arguments as a
        mapping; a call with both is written with keywords. Tensors are on the CPU.

    Raises:
        MisconfigurationException: If the step fails before it calls the sub-module, never
            calls it, or calls it with arguments that have no names.
    """
    submodule = find_submodule(module, path)
    step = _step_name(trainer, module)
    captured = []
    with _silent(module), trainer.precision_plugin.val_step_context():
        for index, batch in enumerate(batches):
            placed = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            call = _first_call(module, submodule, step, placed, index)
            if call is None:
                raise MisconfigurationException(
                    f"{type(module).__name__}.{step} never called its sub-module {path!r}, so "
                    "there is nothing to calibrate on; name the sub-module it calls, as in "
                    "MixedPrecisionCallback(..., module='model')"
                )
            named = _as_batch(submodule, path, call.arguments, call.keywords)
            captured.append(pytree.tree_map_only(Tensor, _own, named))
    return captured


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _step_name(trainer: Trainer, module: LightningModule) -> str:
    """The step that the run calls; after a fit, the first that the module defines."""
    running = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}
    assert trainer.state.fn is not None
    if trainer.state.fn.value in running:
        return running[trainer.state.fn.value]
    own = [name for name in running.values() if is_overridden(name, module)]
    return own[0] if own else "predict_step"


def _first_call(
    module: LightningModule, submodule: nn.Module, step: str, batch: object, index: int
) -> _InputsCaptured | None:
    """The arguments of the step's first call of the sub-module; `None` if it makes none."""

    def capture(_called: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        raise _InputsCaptured(args, kwargs)

    run_step = getattr(module, step)
    handle = submodule.register_forward_pre_hook(capture, prepend=True, with_kwargs=True)
    try:
        run_step(batch, **_further_arguments(run_step, index))
    except _InputsCaptured as call:
        return call
    except Exception as error:
        raise MisconfigurationException(
            f"{type(module).__name__}.{step} failed on calibration batch {index + 1}, before it "
            f"called the sub-module to quantize: {type(error).__name__}: {error}. Calibration "
            f"batches must be what {step} takes, labels included; pass such batches as "
            "MixedPrecisionCallback(..., calibration=loader)"
        ) from error
    finally:
        handle.remove()
    return None


def _further_arguments(run_step: Callable[..., object], index: int) -> dict[str, int]:
    """What a step takes besides the batch, as the Trainer passes it."""
    values = {"batch_idx": index, "dataloader_idx": 0}
    names = inspect.signature(run_step).parameters
    return {name: value for name, value in values.items() if name in names}


def _as_batch(
    submodule: nn.Module, path: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Batch:
    """Write a call as positional arguments only, or as keyword arguments only."""
    if not args:
        return dict(kwargs)
    if not kwargs:
        return tuple(args)
    signature = inspect.signature(submodule.forward)
    named: dict[str, object] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise MisconfigurationException(
                f"the sub-module {path!r} is called with keyword arguments and with positional "
                f"ones that have no name ({name!r} of {type(submodule).__name__}.forward); call "
                "it with one kind only"
            )
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Make `self.log` and `self.log_dict` do nothing: this is no step of the run."""

    def nothing(*_args: object, **_kwargs: object) -> None:
        return None

    names = ("log", "log_dict")
    hidden: dict[str, object] = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(log=nothing, log_dict=nothing)
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(hidden)
