from __future__ import annotations

import pytest
from torch._inductor import config

from fxmpq.errors import TargetError
from fxmpq.targets.inductor.compiler import check_compiler
from fxmpq.targets.registry import get_target


def test_a_compiler_is_found() -> None:
    check_compiler()


def test_a_missing_compiler_is_an_error_before_any_work() -> None:
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        for call in (check_compiler, lambda: get_target("inductor")):
            with pytest.raises(TargetError, match=r"no C\+\+ compiler: install one .* CXX"):
                call()
