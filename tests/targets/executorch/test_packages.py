from __future__ import annotations

import subprocess
import sys

QUIET = """
import logging, sys
handlers = list(logging.root.handlers)
import fxmpq
assert not any(name.startswith(("executorch", "torchao")) for name in sys.modules)
from fxmpq.targets.executorch.packages import WAS_LOADED, Runtime
assert not WAS_LOADED
assert logging.root.handlers == handlers
assert Runtime.get().backend_registry.is_available("XnnpackBackend")
"""


def test_it_is_imported_late_and_without_a_word() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
