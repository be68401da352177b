"""The sizes that a file is written for: memory is set aside for the largest when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxmpq.errors import BatchError
from fxmpq.graph.batches import fixed_size

LARGEST: Mapping[int, int] = {0: 8, 1: 512}
"""Samples (dimension 0) and sequence length (dimension 1) that a file takes at once, where the
trace left them free; less where the model itself takes less."""


@dataclass(frozen=True)
class FreeSizes:
    """What sizes the inputs and outputs of a program may have.

    Args:
        limits: For each input, the largest size of its free dimensions, by dimension.
        batched: Whether each output that is a tensor holds a row a sample.
    """

    limits: tuple[Mapping[int, int], ...]
    batched: tuple[bool, ...]

    @classmethod
    def of(cls, program: ExportedProgram, limits: Sequence[Mapping[int, int]]) -> FreeSizes:
        """Those of a program.

        Args:
            program: Exported with these limits.
            limits: For each of its inputs.
        """
        graph = program.module(check_guards=False).graph
        assert isinstance(graph, fx.Graph)
        samples = {
            str(size)
            for node in graph.find_nodes(op="placeholder")
            if isinstance(value := node.meta.get("val"), Tensor) and value.dim()
            if fixed_size(size := value.shape[0]) is None
        }
        leaves = pytree.tree_leaves(graph.output_node().args)
        values = [leaf.meta.get("val") for leaf in leaves if isinstance(leaf, fx.Node)]
        batched = tuple(
            value.dim() > 0 and str(value.shape[0]) in samples
            for value in values
            if isinstance(value, Tensor)
        )
        return cls(tuple(limits), batched)

    def split(self, inputs: Sequence[object]) -> Iterator[list[object]]:
        """Cut a batch into parts that a program takes.

        Args:
            inputs: Flat, samples along dimension 0 where that is free; one row is for all samples.

        Raises:
            BatchError: If another size is too large, or the outputs are not of single samples.
        """
        for leaf, limits in zip(inputs, self.limits, strict=True):
            for dimension, limit in limits.items():
                if dimension and isinstance(leaf, Tensor) and leaf.shape[dimension] > limit:
                    raise BatchError(
                        f"the file takes up to {limit} values along dimension {dimension} of an "
                        f"input; this one has shape {tuple(leaf.shape)}"
                    )
        counts = {
            leaf.shape[0]: limits[0]
            for leaf, limits in zip(inputs, self.limits, strict=True)
            if isinstance(leaf, Tensor) and 0 in limits
        }
        samples = max(counts, default=1)
        step = counts.get(samples, 1)
        if samples > step and not all(self.batched):
            raise BatchError(
                f"the file takes up to {step} samples at once, and this batch has {samples}; it "
                "cannot be cut, since the model also returns what is not of single samples"
            )
        for start in range(0, samples, step):
            yield [
                leaf[start : start + step]
                if isinstance(leaf, Tensor) and 0 in limits and leaf.shape[0] == samples
                else leaf
                for leaf, limits in zip(inputs, self.limits, strict=True)
            ]

    def join(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Put the outputs for the parts of a batch together."""
        if len(parts) == 1:
            return list(parts[0])
        return [torch.cat(found) for found in zip(*parts, strict=True)]
