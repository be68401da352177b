from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from fxmpq.callbacks.options import check_options, own_journal
from fxmpq.errors import FxmpqError
from fxmpq.sensitivity.measure import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_legal_and_its_data_is_not(method: str) -> None:
    data, options = [], ["bias_correction", "resume"]
    for name, parameter in inspect.signature(METHODS[method].estimate).parameters.items():
        has_default = parameter.default is not inspect.Parameter.empty
        if name != "work":
            (options if has_default or name == "loss" else data).append(name)
    check_options(method, dict.fromkeys(options))
    assert len(data) == 2
    for name in data:
        with pytest.raises(FxmpqError, match=f"no option '{name}'"):
            check_options(method, {name: None})


def test_an_unknown_option_is_refused_with_the_closest() -> None:
    with pytest.raises(FxmpqError, match=r"no option 'prob'.*there are 'probes'"):
        check_options("projected", {"prob": 2})


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(FxmpqError, match="no sensitivity method 'exact'"):
        check_options("exact", {})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("hessian", {"loss": "trainin_step"}, "no loss 'trainin_step'; there are 'training_step'"),
        ("sqnr", {"score": "validation"}, "no score 'validation'; there are 'validation_step'"),
    ],
)
def test_an_unknown_step_is_refused(method: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(FxmpqError, match=message):
        check_options(method, options)
    check_options("sqnr", {"score": "kl"})
    check_options("sqnr", {"score": "validation_step"})
    check_options("finetune", {"loss": lambda model, batch: model(batch).mean()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": "minmx"}, "no rule 'minmx' for ranges; there are 'minmax'"),
        ({"ranges": {"rule": "mse", "p": 0}}, "mse's p must be a number greater than 0"),
        ({"weight_scales": "kl"}, "no rule 'kl' for weight_scales"),
    ],
)
def test_an_unknown_rule_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(FxmpqError, match=message):
        check_options("projected", options)
    check_options("projected", {"ranges": {"rule": "percentile", "percentile": 99.9}})
    check_options("sqnr", {"ranges": "kl", "weight_scales": "minmax", "score": "kl"})


def test_each_process_has_a_journal_of_its_own() -> None:
    """The first has the one that was named; nothing else changes."""
    options = {"resume": Path("sweep.journal"), "probes": 2}
    assert own_journal(options, 0) == options
    assert own_journal(options, 2) == {"resume": "sweep.journal.2", "probes": 2}
    assert own_journal({"probes": 2}, 2) == {"probes": 2}
    assert own_journal({"resume": None}, 2) == {"resume": None}
