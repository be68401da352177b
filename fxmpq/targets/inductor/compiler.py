"""The C++ compiler that PyTorch's compiler needs."""

from __future__ import annotations

from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from fxmpq.errors import TargetError


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
