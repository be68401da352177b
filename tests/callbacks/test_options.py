from __future__ import annotations

import inspect

import pytest

from fxmpq.callbacks.options import check_options
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
