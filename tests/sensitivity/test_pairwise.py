from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, fx, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.state import copy_graph, require
from fxmpq.graph.switch import switch_group
from fxmpq.graph.trace import trace
from fxmpq.journal import Journal
from fxmpq.sensitivity.pairwise import (
    _pair_increases,
    assemble,
    pairwise,
    semidefinite_factor,
)
from fxmpq.sensitivity.scores import find_score
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.sqnr import sqnr
from fxmpq.sensitivity.sweep import Sweep, measuring
from fxmpq.work import Work

from .conftest import cross_entropy, four_layers, labelled_batches

Calibrated = Callable[..., fx.GraphModule]
Choices = dict[str, str]
LOW = [Precision(2, 8), Precision(3, 8), Precision(8, 8)]


class Parallel(nn.Module):
    """Linear paths that meet in a sum: the output's error is the sum of the paths' errors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.a(x) + self.b(y) + self.c(z)


@pytest.fixture(scope="module")
def inputs() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(14, 5, generator=generator)
    own = torch.randn(3, 14, 5, generator=generator)
    # Inputs that resemble each other make errors that do.
    tensors = [(shared + 0.05 * part).split([9, 5]) for part in own]
    return list(zip(*tensors, strict=True))


@pytest.fixture(scope="module")
def parallel(calibrated: Calibrated, inputs: list[tuple[Tensor, ...]]) -> fx.GraphModule:
    torch.manual_seed(0)
    model = Parallel().eval()
    with torch.no_grad():
        for layer in (model.b, model.c):
            layer.weight.copy_(model.a.weight)
    return calibrated(trace(model, inputs[0]), inputs, candidates=LOW)


@pytest.fixture(scope="module")
def labelled() -> list[tuple[Tensor, Tensor]]:
    return labelled_batches()


@pytest.fixture(scope="module")
def deep(calibrated: Calibrated, labelled: list[tuple[Tensor, Tensor]]) -> fx.GraphModule:
    data = [x for x, _ in labelled]
    return calibrated(trace(four_layers(), data[0]), data, candidates=LOW[:2], exclude=["4"])


def whole_outputs(graph: fx.GraphModule, choices: Choices, batches: list[object]) -> Tensor:
    switched = copy_graph(graph)
    for group in require(graph, stage="calibrated").groups:
        if group.name in choices:
            switch_group(switched, group, Precision.parse(choices[group.name]))
    calls = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    with torch.no_grad():
        return torch.cat([switched(*call) for call in calls]).double()


def plans(found: Sensitivity) -> list[Choices]:
    return [
        dict(zip(found.values, choice, strict=True))
        for choice in itertools.product(*found.values.values())
    ]


def one_hot(found: Sensitivity, choices: Choices) -> np.ndarray:
    return np.array([float(choices.get(group) == name) for group, name in found.entries])


def raw_matrix(graph: fx.GraphModule, data: list[object], asked: object) -> np.ndarray:
    """The matrix before its projection."""
    groups = require(graph, stage="calibrated").groups
    entries = [(group.name, str(c)) for group in groups for c in group.candidates]
    with measuring():
        found = _pair_increases(Sweep(graph), data, find_score(asked), entries, Work())
    return assemble(found, [group for group, _ in entries])


def test_the_matrix_of_linear_paths_in_closed_form(
    parallel: fx.GraphModule, inputs: list[tuple[Tensor, ...]]
) -> None:
    found = pairwise(parallel, inputs, score="noise")
    exact = whole_outputs(parallel, {}, inputs)
    errors = [whole_outputs(parallel, dict([entry]), inputs) - exact for entry in found.entries]
    gram = np.array([[float((a * b).sum()) for b in errors] for a in errors])
    gram /= float(exact.square().sum())
    groups = np.array([group for group, _ in found.entries])
    gram[(groups[:, None] == groups) & ~np.eye(len(groups), dtype=bool)] = 0
    assert raw_matrix(parallel, inputs, "noise") == pytest.approx(gram, rel=1e-4, abs=1e-8)
    eigenvalues, vectors = np.linalg.eigh(gram)
    assert eigenvalues[0] < -1e-5
    nearest = (vectors * eigenvalues.clip(min=0)) @ vectors.T
    assert found.pairs() == pytest.approx(nearest, rel=1e-4, abs=1e-8)
    assert (found.unit, found.method) == ("noise", "pairwise")


def test_a_quadratic_loss_is_predicted_for_every_plan(
    parallel: fx.GraphModule, inputs: list[tuple[Tensor, ...]]
) -> None:
    found = sqnr(parallel, inputs)
    matrix = raw_matrix(parallel, inputs, "noise")
    exact = whole_outputs(parallel, {}, inputs)
    for choices in plans(found):
        x = one_hot(found, choices)
        error = whole_outputs(parallel, choices, inputs) - exact
        measured = float(error.square().sum() / exact.square().sum())
        assert x @ matrix @ x == pytest.approx(measured, rel=1e-4, abs=1e-8)


def test_one_candidate_a_group_needs_no_projection(
    calibrated: Calibrated, inputs: list[tuple[Tensor, ...]]
) -> None:
    torch.manual_seed(0)
    graph = calibrated(trace(Parallel().eval(), inputs[0]), inputs, candidates=[LOW[0]])
    found = pairwise(graph, inputs, score="noise")
    matrix, exact = found.pairs(), whole_outputs(graph, {}, inputs)
    assert np.diag(matrix) == pytest.approx([found.value(g, "w2a8") for g in "abc"], rel=1e-4)
    for chosen in itertools.product([False, True], repeat=3):
        choices = {name: "w2a8" for name, is_low in zip("abc", chosen, strict=True) if is_low}
        x = one_hot(found, choices)
        error = whole_outputs(graph, choices, inputs) - exact
        measured = float(error.square().sum() / exact.square().sum())
        assert x @ matrix @ x == pytest.approx(measured, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("asked", ["noise", "kl", cross_entropy])
def test_pairs_equal_the_naive_ones(
    deep: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]], asked: object
) -> None:
    inputs = [x for x, _ in labelled]
    labels = torch.cat([y for _, y in labelled])
    exact = whole_outputs(deep, {}, inputs)

    def score(choices: Choices) -> float:
        found = whole_outputs(deep, choices, inputs)
        if asked == "noise":
            return float((found - exact).square().sum() / exact.square().sum())
        if asked == "kl":
            target = exact.log_softmax(-1)
            return float(
                functional.kl_div(
                    found.log_softmax(-1), target, reduction="batchmean", log_target=True
                )
            )
        return float(functional.cross_entropy(found, labels))

    data = inputs if isinstance(asked, str) else labelled
    found = pairwise(deep, data, score=asked)
    assert found.unit == ("noise" if asked == "noise" else "loss")
    assert found.fingerprint == require(deep, stage="calibrated").fingerprint
    base = score({})
    matrix = np.zeros((len(found.entries), len(found.entries)))
    for i, (group, precision) in enumerate(found.entries):
        single = score({group: precision}) - base
        assert found.value(group, precision) == pytest.approx(single, rel=1e-5, abs=1e-9)
        matrix[i, i] = single
        for j, (other, its) in enumerate(found.entries[:i]):
            if other != group:
                pair = score({group: precision, other: its}) - base
                matrix[i, j] = matrix[j, i] = (pair - single - matrix[j, j]) / 2
    assert raw_matrix(deep, data, asked) == pytest.approx(matrix, rel=1e-5, abs=1e-9)
    factor = semidefinite_factor(matrix)
    assert found.pairs() == pytest.approx(factor.T @ factor / len(factor), rel=1e-5, abs=1e-8)
    assert found.values["4"] == {"fp32": 0.0}
    if isinstance(asked, str):
        assert found.values == sqnr(deep, inputs, score=asked).values


def test_pairs_run_only_what_lies_downstream_of_the_later_group(
    deep: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run_node = Sweep.run_node

    def counted(sweep: Sweep, node: fx.Node) -> object:
        ran.append(node.name)
        return run_node(sweep, node)

    monkeypatch.setattr(Sweep, "run_node", counted)
    pairwise(deep, [labelled[0][0]])
    # Two candidates of the groups 0, 2 and 6, group 4 stays float: 6 entries, 3 * 4 pairs.
    assert ran.count("linear") == 1 + 2
    assert ran.count("linear_1") == 1 + 4 + 4
    assert ran.count("linear_3") == 1 + 6 + 12


@given(arrays(float, (5, 5), elements=st.floats(-10, 10, width=32)))
def test_factors_give_the_nearest_semidefinite_matrix(matrix: np.ndarray) -> None:
    matrix = matrix + matrix.T
    factor = semidefinite_factor(matrix)
    found = factor.T @ factor / len(factor)
    # The nearest: what the projection adds is semi-definite too, and orthogonal to what is left.
    added = found - matrix
    assert np.linalg.eigvalsh(found)[0] >= -1e-9
    assert np.linalg.eigvalsh(added)[0] >= -1e-9
    assert float((added * found).sum()) == pytest.approx(0, abs=1e-7)


@given(arrays(float, (4, 4), elements=st.floats(-10, 10, width=32)))
def test_assembled_matrices_predict_singles_and_pairs(increases: np.ndarray) -> None:
    matrix = assemble(increases, ["a", "a", "b", "c"])
    assert (matrix == matrix.T).all()
    assert matrix[0, 1] == 0
    for i, j in [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]:
        x = np.eye(4)[i] + np.eye(4)[j]
        assert x @ matrix @ x == pytest.approx(increases[i, j], abs=1e-9)
        assert matrix[i, i] == increases[i, i]


@pytest.mark.parametrize("finished", [0, 1, 4, 9])
def test_an_interrupted_run_goes_on_bit_for_bit(
    deep: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]], tmp_path: Path, finished: int
) -> None:
    expected = pairwise(deep, labelled, score=cross_entropy)
    path = tmp_path / "journal"
    pairwise(deep, labelled, score=cross_entropy, work=Work(journal=Journal(path, {})))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 1 + finished]))
    work = Work(journal=Journal(path, {}))
    resumed = pairwise(deep, labelled, score=cross_entropy, work=work)
    assert resumed.values == expected.values
    assert np.array_equal(resumed.projections, expected.projections)
    assert path.read_text().splitlines(keepends=True) == lines


def test_bad_requests_are_errors(
    deep: fx.GraphModule, labelled: list[tuple[Tensor, Tensor]]
) -> None:
    inputs = [x for x, _ in labelled]
    with pytest.raises(FxmpqError, match="MulticlassAccuracy is a metric; give 'kl'"):
        pairwise(deep, labelled, score=MulticlassAccuracy(3))
    with pytest.raises(CalibrationError, match="is empty"):
        pairwise(deep, [])
    with pytest.raises(CalibrationError, match="unchanged model is nan"):
        pairwise(deep, [x * torch.nan for x in inputs], score="kl")


@pytest.mark.parametrize(("at", "names"), [(2, "'a' at w2a8 is nan"), (3, "'a' at w2a8 with 'b'")])
def test_an_increase_that_is_no_number_is_named(
    calibrated: Calibrated, inputs: list[tuple[Tensor, ...]], at: int, names: str
) -> None:
    """Rather than left to an eigenvalue solver."""
    calls = 0

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal calls
        calls += 1
        return model(*batch).square().mean() * (torch.nan if calls == at else 1)

    graph = calibrated(trace(Parallel(), inputs[0]), inputs, candidates=LOW)
    with pytest.raises(FxmpqError, match=names):
        pairwise(graph, inputs[:1], score=loss)
