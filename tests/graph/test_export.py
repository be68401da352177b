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
    program, dynamic, _ = export_program(Embeds(), example, {})
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
    program, dynamic, _ = export_program(model, (), kwargs)
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
    program, dynamic, _ = export_program(FixedBatch(), (torch.ones(2, 8),), {})
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


class Comparing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 2 else x


class Positions(nn.Module):
    """Its positions are as many as the example's."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids + torch.arange(6)


class UnfitForSequences(nn.Module):
    """Exports with free samples, and not with free sequences, as it says itself."""

    def forward(self, ids: Tensor) -> Tensor:
        if not isinstance(ids.shape[1], int):
            raise TypeError("no free sequences here\nand much more")
        return ids * 2


class UnfitForBoth(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        if not isinstance(ids.shape[0], int):
            raise TypeError("no free samples here" + "!" * 300)
        return ids * 2


IDS = torch.ones(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    ("model", "example", "dynamic", "expected"),
    [
        (FixedBatch(), torch.ones(2, 8), False, [("x", 0, 2, "return x + torch.ones(2, 8)")]),
        (Comparing(), torch.ones(2, 8), False, [("x", 0, 2, "if x.shape[0] == 2")]),
        (Positions(), IDS, True, [("ids", 1, 6, "return ids + torch.arange(6)")]),
        (UnfitForSequences(), IDS, True, [("ids", 1, 6, "no free sequences here, at ")]),
        (
            UnfitForBoth(),
            IDS,
            False,
            [("ids", 0, 2, "no free samples here!!!"), ("ids", 1, 6, "no free samples here!!!")],
        ),
        (nn.Linear(8, 3), torch.ones(2, 8), True, []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_fixed_is_told_with_the_line_that_fixes_it(
    model: nn.Module, example: Tensor, dynamic: bool, expected: list[tuple[str, int, int, str]]
) -> None:
    program, is_free, fixed = export_program(model, (example,), {})
    assert is_free is dynamic
    assert [(e.argument, e.dimension, e.size) for e in fixed] == [e[:3] for e in expected]
    for entry, (*_, words) in zip(fixed, expected, strict=True):
        assert words in entry.reason
        assert "test_export.py:" in entry.reason
        assert "\n" not in entry.reason
        assert len(entry.reason) < 400
    shapes = input_shapes(program)
    for entry in fixed:
        assert shapes[entry.argument][entry.dimension] == entry.size


def test_two_inputs_are_told_apart() -> None:
    class Two(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return ids + torch.arange(6) + mask.sum(1, keepdim=True)

    _, dynamic, fixed = export_program(Two(), (), {"mask": torch.ones_like(IDS), "ids": IDS})
    assert dynamic
    assert [(entry.argument, entry.dimension) for entry in fixed] == [("ids", 1)]
