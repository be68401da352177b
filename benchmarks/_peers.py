"""Other libraries, each in an environment of its own, so that they quantize as installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _models import CACHE
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Peer:
    """A library and the script that quantizes with it.

    Args:
        packages: What its environment holds.
        script: Beside this file; takes the model's file, the data's, and the one to write.
    """

    packages: tuple[str, ...]
    script: str


PEERS: Mapping[str, Peer] = {
    "NNCF": Peer(("nncf==3.4.0", "openvino==2026.4.1"), "_peer_nncf.py"),
    "torchao": Peer(("torch==2.13.0", "torchao==0.18.0", "numpy"), "_peer_torchao.py"),
}


def quantized_by(
    name: str, model: Path, batches: Sequence[Batch], output: Path, *, is_transformer: bool
) -> Path:
    """Let a library quantize a model's file.

    Args:
        name: A key of `PEERS`.
        model: In the form that its script reads.
        batches: Calibration data.
        output: The file to write.
        is_transformer: Whether the library is told so, where it asks.

    Returns:
        The file.
    """
    data = output.with_suffix(".npz")
    arrays = {
        f"{number}:{key}": tensor.numpy()
        for number, batch in enumerate(batches)
        for key, tensor in batch.items()
    }
    np.savez(data, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for options
    command = [str(_python(name)), str(Path(__file__).with_name(PEERS[name].script))]
    kind = ["--transformer"] if is_transformer else []
    subprocess.run([*command, str(model), str(data), str(output), *kind], check=True)
    return output


def _python(name: str) -> Path:
    """The interpreter of a library's environment, which is made the first time."""
    folder = CACHE / "environments" / name.lower()
    python = folder / "bin/python"
    done = folder / "installed.txt"
    packages = "\n".join(PEERS[name].packages)
    if not done.exists() or done.read_text() != packages:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *PEERS[name].packages], check=True)
        done.write_text(packages)
    return python
