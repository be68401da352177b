from __future__ import annotations

import logging
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from fxmpq.errors import BatchError, TraceError
from fxmpq.graph.batches import fixed_size
from fxmpq.graph.export import export_program, quiet_torch


class Options(nn.Module):
    """Takes part of its arguments as `**kwargs`, like the models of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor | None = None, **options: object) -> Tensor:
        z = self.fc(x)
        if isinstance(options.get("bias"), Tensor):
            z = z + options["bias"]
        return z * 2 if options.get("double") else z if y is None else z + y


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 8)


def input_shapes(program: torch.export.ExportedProgram) -> dict[str, list[object]]:
    names = program.graph_signature.user_inputs
    return {
        node.name: [fixed_size(size) or "free" for size in node.meta["val"].shape]
        for node in program.graph.nodes
        if node.name in names and isinstance(node.meta["val"], Tensor)
    }


def test_the_batch_is_free_and_the_sequence_of_integers_too() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.table(ids).sum(1) + x

    example = (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 4))
    program, dynamic = export_program(Embeds(), example, {})
    assert dynamic
    assert input_shapes(program) == {"ids": ["free", "free"], "x": ["free", 4]}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"y": torch.ones(2, 4), "x": torch.ones(2, 4)},
        {"x": torch.ones(2, 4), "double": True},
        {"bias": torch.ones(2, 4), "double": False, "x": torch.ones(2, 4)},
    ],
)
def test_keyword_arguments_may_come_in_any_order_and_in_kwargs(kwargs: dict[str, object]) -> None:
    model = Options()
    program, dynamic = export_program(model, (), kwargs)
    assert dynamic
    assert set(input_shapes(program)) == {k for k, v in kwargs.items() if isinstance(v, Tensor)}
    assert all(shape == ["free", 4] for shape in input_shapes(program).values())
    assert "forward" not in vars(model)
    more = {k: torch.randn(5, 4) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    found = program.module(check_guards=False)(**more)
    assert torch.allclose(found, model(**more))


def test_a_forward_of_the_models_own_is_put_back() -> None:
    model = Options()
    forward = model.forward
    vars(model)["forward"] = forward
    export_program(model, (), {"x": torch.ones(2, 4), "double": True})
    assert vars(model)["forward"] is forward


def test_sizes_are_fixed_where_the_model_fixes_them() -> None:
    program, dynamic = export_program(FixedBatch(), (torch.ones(2, 8),), {})
    assert not dynamic
    assert input_shapes(program) == {"x": [2, 8]}


def test_a_model_that_does_not_export_is_an_error_that_names_the_line() -> None:
    with pytest.raises(TraceError) as caught:
        export_program(Branches(), (torch.ones(2, 3),), {})
    message = str(caught.value)
    assert "torch.export cannot take Branches" in message
    assert "test_export.py" in message
    assert "if x.sum() > 0" in message
    assert "torch.where or torch.cond" in message
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((torch.ones(2, 5),), {}), ((), {"z": torch.ones(2, 4)}), ((), {})],
)
def test_a_batch_that_the_model_does_not_take_is_an_error(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    with pytest.raises(BatchError, match="Linear cannot run this batch: "):
        export_program(nn.Linear(4, 4), args, kwargs)


def test_torchs_notices_stay_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("torch.notices")
    with quiet_torch():
        warnings.warn("hidden", stacklevel=1)
        sys.stdout.write("hidden")
        sys.stderr.write("hidden")
        logger.error("hidden")
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable < logging.ERROR
    with pytest.warns(UserWarning, match="shown"):
        warnings.warn("shown", stacklevel=1)
