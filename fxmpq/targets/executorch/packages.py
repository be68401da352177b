"""What this target takes from ExecuTorch, imported without its notices.

Importing it warns of its own deprecations, logs about libraries that torchao does not find, and
gives Python's root logger a handler; users of fxmpq asked for none of that.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fxmpq.graph.export import quiet_torch

WAS_LOADED = "executorch.extension.pybindings._C" in sys.modules
"""Whether the runtime was in this process before, and so perhaps programs that hold its threads."""


@contextmanager
def quiet_packages() -> Iterator[None]:
    """Keep back what ExecuTorch and torch say, and undo what they change for all of a process.

    Logging to Python's root logger gives that a handler, and lowering draws random numbers.
    """
    handlers = list(logging.root.handlers)
    try:
        with quiet_torch(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.root.handlers[:] = handlers


with quiet_packages():
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.gemm_configs import LinearConfig
    from executorch.backends.xnnpack.partition.config.generic_node_configs import (
        UnsqueezeCopyConfig,
    )
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_dynamic_qdq
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir._serialize._flatbuffer import _flatc_decompile as flatc_decompile
    from executorch.extension.pybindings.portable_lib import (
        _threadpool_get_thread_count as count_threads,
    )
    from executorch.extension.pybindings.portable_lib import (
        _unsafe_reset_threadpool as reset_threads,
    )
    from executorch.runtime import Runtime

__all__ = [
    "ALL_PARTITIONER_CONFIGS",
    "WAS_LOADED",
    "ConfigPrecisionType",
    "EdgeCompileConfig",
    "LinearConfig",
    "Runtime",
    "UnsqueezeCopyConfig",
    "XnnpackPartitioner",
    "count_threads",
    "flatc_decompile",
    "is_dequant",
    "is_dynamic_qdq",
    "quiet_packages",
    "reset_threads",
    "to_edge_transform_and_lower",
]
