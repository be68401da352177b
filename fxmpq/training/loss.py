"""Losses from labels: a callable of the user's, or a step of the user's LightningModule."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxmpq.errors import FxmpqError, closest
from fxmpq.graph.batches import Item
from fxmpq.graph.run import float_outputs

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

LossFunction = Callable[[nn.Module, Any], Tensor]
"""`loss(model, batch)`: a scalar, the mean over the batch's samples; the batch holds labels."""


class StepLoss:
    """The loss of a LightningModule's own step, with another module in the network's place.

    The LightningModule is copied once, without its network and its Trainer, so that its metrics
    and logs see nothing. A call puts `model` at `path` inside the copy, runs the step on the
    batch in evaluation mode, and returns the loss: the step's result, its first item if it is a
    tuple, or its entry `loss`.

    Args:
        module: The LightningModule; not changed.
        path: Attribute path of the network in it, as `model` or `net.encoder`.
        step: `training_step` or `validation_step`; it must return the loss.

    Attributes:
        module: The copy, with nothing in the network's place.
        path: As given.
        step: As given.

    Raises:
        FxmpqError: If the module has no such network or step, or cannot be copied; on a call,
            if the step returns no scalar loss.

    Examples:
        >>> class Classifier(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.model = nn.Linear(2, 2)
        ...     def training_step(self, batch, batch_idx):
        ...         return nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        >>> loss = StepLoss(Classifier())
        >>> certain = nn.Identity()
        >>> float(loss(certain, (torch.tensor([[9.0, 0.0]]), torch.tensor([0])))) < 1e-3
        True
    """

    def __init__(self, module: nn.Module, path: str = "model", step: str = "training_step") -> None:
        known = {name: child for name, child in module.named_modules() if name}
        if path not in known:
            raise FxmpqError(
                f"{type(module).__name__} has no sub-module {path!r}; closest: "
                f"{closest(path, known)}"
            )
        if not callable(getattr(module, step, None)):
            raise FxmpqError(
                f"{type(module).__name__} has no {step!r} to take the loss from; give "
                "'training_step' or 'validation_step', or a callable loss(model, batch)"
            )
        self.module = _copy_around(module, known[path])
        self.path = path
        self.step = step
        self._put(nn.Identity())

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """The step's loss on a batch, computed with `model` as the network."""
        step = getattr(self.module, self.step)
        _, *further = inspect.signature(step).parameters.values()
        # The index of the batch, and of its loader if the step insists on one.
        wanted = [
            entry
            for entry in further
            if entry.default is inspect.Parameter.empty and entry.kind in _BY_POSITION
        ]
        self._put(model)
        try:
            return _loss_of(step(batch, *[0 for _ in wanted]), self.step)
        finally:
            # The network is not kept: neither its memory, nor as a part of what this loss is.
            self._put(nn.Identity())

    def _put(self, model: nn.Module) -> None:
        """Put a module in the network's place."""
        parent, _, name = self.path.rpartition(".")
        setattr(self.module.get_submodule(parent), name, model)


def check_loss(loss: object) -> None:
    """Refuse what is no loss.

    Raises:
        FxmpqError: With what is one.
    """
    if not callable(loss) or isinstance(loss, str):
        raise FxmpqError(
            "a loss is a callable loss(model, batch) that returns a scalar tensor, or "
            f"fxmpq.StepLoss(your LightningModule); found {type(loss).__name__}"
        )


def loss_value(loss: LossFunction, model: nn.Module, batch: object) -> Tensor:
    """Call a loss on what lies on the graph's device, and check what it returns.

    Args:
        loss: The user's.
        model: What it runs.
        batch: What it takes, on the device of the model.

    Returns:
        A scalar, shape `[]`.

    Raises:
        FxmpqError: If it returns anything but a tensor with one value.
    """
    found = loss(model, batch)
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = f"a tensor of {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise FxmpqError(
            f"loss(model, batch) must return a scalar tensor, the mean over samples; found {what}"
        )
    return found.reshape(())


def check_was_run(was_run: bool) -> None:
    """Refuse a loss that returned without running the model.

    Raises:
        FxmpqError: If it did not.
    """
    if not was_run:
        raise FxmpqError(
            "the loss returned without running the model it was given; loss(model, batch) must "
            "call `model` on the inputs in `batch`"
        )


def on_device(batch: Item, device: torch.device) -> Item:
    """Move all tensors in a batch to a device.

    Tensors made in inference mode are copied, since they can never be differentiated. The batch
    itself is not changed.

    Args:
        batch: Any nesting of tensors and plain values, in mappings of any kind too.
        device: Where to.
    """

    def moved(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return (leaf.clone() if leaf.is_inference() else leaf).to(device)
        if isinstance(leaf, MutableMapping):
            # As tokenizers return: no container to torch.
            leaf = copy.copy(leaf)
            leaf.update({name: on_device(entry, device) for name, entry in leaf.items()})
        return leaf

    found: Item = pytree.tree_map(moved, batch)
    return found


def batch_samples(batch: object) -> int:
    """Number of samples: the first dimension of the first tensor in a batch that has one.

    Args:
        batch: Any nesting of tensors and plain values, in mappings of any kind too.

    Examples:
        >>> batch_samples({"x": torch.zeros(4, 2), "y": torch.zeros(4)})
        4
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Mapping) and leaf:
            return batch_samples(list(leaf.values()))
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    return 1


def classification_loss(model: nn.Module, batch: object) -> Tensor:
    """Cross-entropy of the model's first floating-point output, for batches `(inputs, labels)`.

    Args:
        model: Takes `inputs`: a tensor, a tuple of arguments, or a mapping of keyword arguments.
        batch: `(inputs, labels)`, labels `[samples]` as class numbers.

    Returns:
        The mean over samples, in nats.

    Raises:
        FxmpqError: If the batch is no pair, or the model returns no logits.

    Examples:
        >>> batch = torch.zeros(3, 2), torch.tensor([0, 1, 1])
        >>> round(float(classification_loss(nn.Identity(), batch)), 3)
        0.693
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise FxmpqError(
            f"classification_loss takes batches (inputs, labels); found {type(batch).__name__}"
        )
    inputs, labels = batch
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    found = float_outputs(outputs)
    if not found:
        raise FxmpqError("the model returns no floating-point output to take as logits")
    return nn.functional.cross_entropy(found[0], labels)


def divergences(reference: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergences of softmax outputs, in nats.

    `sum_k p_k (log p_k - log q_k)` with `p = softmax(reference)` and `q = softmax(found)`.

    Args:
        reference: Logits `[..., classes]`; a class at minus infinity has no share.
        found: Logits of the same shape.

    Returns:
        One for each distribution, shape `[...]`, in the dtype of the logits.

    Examples:
        >>> divergences(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([0.1201])
    """
    expected = reference.log_softmax(dim=-1)
    terms = expected.exp() * (expected - found.log_softmax(dim=-1))
    return terms.masked_fill(expected == -torch.inf, 0).sum(dim=-1)


def _copy_around(module: nn.Module, network: nn.Module) -> nn.Module:
    """Copy a LightningModule but for its network and its Trainer, in eval mode, logging nothing."""
    memo: dict[int, object] = {id(network): network}
    for name in ("_trainer", "_fabric"):
        memo[id(vars(module).get(name))] = vars(module).get(name)
    try:
        with torch.inference_mode(False):
            duplicate = copy.deepcopy(module, memo)
    except Exception as error:
        raise FxmpqError(
            f"{type(module).__name__} cannot be copied, so its steps cannot be run aside: "
            f"{type(error).__name__}: {error}. Give a callable loss(model, batch) instead"
        ) from error
    vars(duplicate).update(log=_log_nothing, log_dict=_log_nothing)
    flags = {child: child.training for child in network.modules()}
    duplicate.eval()
    for child, flag in flags.items():
        child.training = flag
    return duplicate


def _log_nothing(*_args: object, **_kwargs: object) -> None:
    """Stands in for `self.log`: this is no step of a run."""


def _loss_of(result: object, step: str) -> Tensor:
    if isinstance(result, Mapping):
        result = result.get("loss")
    elif isinstance(result, (tuple, list)) and result:
        result = result[0]
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise FxmpqError(
            f"{step} returned {type(result).__name__}, which is no scalar loss; return the loss "
            "from it, or give a callable loss(model, batch)"
        )
    return result.reshape(())
