"""What PyTorch's compiler needs: a C++ compiler, and a CPU that has what it is asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from fxmpq.errors import TargetError


def check_bfloat16() -> None:
    """Refuse to go on where this CPU has no products of bfloat16.

    Raises:
        TargetError: If it has neither AVX512-BF16 nor AMX, where torch tells what it has.
    """
    # Not every torch that is supported may have it; without it results are the same, if not faster.
    tell = getattr(torch.cpu, "get_capabilities", None)
    found: Mapping[str, object] = {"avx512_bf16": True} if tell is None else tell()
    if not (found.get("avx512_bf16") or found.get("amx_bf16")):
        raise TargetError(
            "target 'inductor-bf16' computes in bfloat16, for which this CPU has neither "
            "AVX512-BF16 nor AMX; prepare for 'inductor'"
        )


def check_compiler() -> None:
    """Refuse to go on where the compiled graph's loops cannot be built.

    Raises:
        TargetError: If torch finds no C++ compiler.
    """
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise TargetError(
            "target 'inductor' builds C++ code, but torch finds no C++ compiler: install one (g++ "
            "on Linux) or name it in the environment variable CXX; 'openvino' and 'onnxruntime' "
            "run int8 without one"
        ) from error
