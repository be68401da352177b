"""An ExecuTorch program loaded in this process."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fxmpq.errors import TargetError
from fxmpq.targets.executorch.packages import WAS_LOADED, Runtime, count_threads, reset_threads
from fxmpq.targets.executorch.sizes import FreeSizes


class ExecutorchModel:
    """A program that the runtime holds, which runs any number of samples.

    The runtime sets memory aside for the largest batch when it loads a program, so that is small;
    more samples run in several batches. It has as many threads as torch had when the first program
    of the process was loaded.

    Args:
        data: The file's content.
        sizes: What sizes its inputs and outputs may have.
        is_traced: Whether runs are traced, for `events`.
    """

    def __init__(self, data: bytes, sizes: FreeSizes, *, is_traced: bool = False) -> None:
        self._sizes = sizes
        with quiet_runtime():
            _set_threads()
            try:
                self._program = Runtime.get().load_program(data, enable_etdump=is_traced)
                method = self._program.load_method("forward")
            except RuntimeError as error:
                raise TargetError(f"ExecuTorch cannot load the file it wrote: {error}") from error
        assert method is not None
        self._method = method

    def __call__(self, inputs: Sequence[object]) -> list[Tensor]:
        """Run on flat inputs and return the tensors among the flat outputs.

        Raises:
            BatchError: If a size is more than what the file was written for.
            TargetError: If a kernel refuses what it is to compute, as portable ones do of a
                convolution of three dimensions.
        """
        # The program reads values in the order of dimensions, wherever strides say that they lie.
        leaves = [
            leaf.detach().cpu().contiguous() if isinstance(leaf, Tensor) else leaf
            for leaf in inputs
        ]
        try:
            parts = [
                [leaf for leaf in self._method.execute(part) if isinstance(leaf, Tensor)]
                for part in self._sizes.split(leaves)
            ]
        except RuntimeError as error:
            raise TargetError(
                f"ExecuTorch cannot run this model: {error}; it wrote the reason to standard "
                "error. Target 'onnxruntime' may, and 'reference' does"
            ) from error
        return self._sizes.join(parts)

    def events(self, inputs: Sequence[object], folder: Path) -> bytes:
        """Run a program that is traced.

        Args:
            inputs: As for a call.
            folder: To write to.

        Returns:
            What ran, in the runtime's own format.
        """
        self(inputs)
        file = folder / "events.etdp"
        self._program.write_etdump_result_to_file(str(file), str(folder / "values.bin"))
        return file.read_bytes()


@cache
def _set_threads() -> None:
    """Give the runtime as many threads as torch has, once: loaded programs hold on to its pool."""
    if not WAS_LOADED:
        reset_threads(torch.get_num_threads())


def fixed_threads() -> int:
    """In how many threads the runtime computes, from now on if it was not settled before."""
    with quiet_runtime():
        _set_threads()
        return int(count_threads())


@contextmanager
def quiet_runtime() -> Iterator[None]:
    """Keep the runtime's notes on the machine, which it writes to standard error, from there.

    What other threads write there meanwhile is lost too.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        # Some of them it writes by way of Python.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
