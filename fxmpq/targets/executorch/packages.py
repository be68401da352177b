"""What this target takes from ExecuTorch, imported without its notices.

Importing it warns of its own deprecations, logs about libraries that torchao does not find, and
gives Python's root logger a handler; users of fxmpq asked for none of that.
"""

from __future__ import annotations

import logging
import sys

from fxmpq.graph.export import quiet_torch

WAS_LOADED = "executorch.extension.pybindings._C" in sys.modules
"""Whether the runtime was in this process before, and so perhaps programs that hold its threads."""

_handlers = list(logging.root.handlers)
try:
    with quiet_torch():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from executorch.exir._serialize._flatbuffer import _flatc_decompile as flatc_decompile
        from executorch.extension.pybindings.portable_lib import (
            _unsafe_reset_threadpool as reset_threads,
        )
        from executorch.runtime import Runtime
finally:
    logging.root.handlers[:] = _handlers

__all__ = [
    "WAS_LOADED",
    "EdgeCompileConfig",
    "Runtime",
    "XnnpackPartitioner",
    "flatc_decompile",
    "reset_threads",
    "to_edge_transform_and_lower",
]
