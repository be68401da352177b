"""Validates with the callback in several processes; run as a script by test_strategies.py.

Each process offers other calibration data, and writes its plan and its graph's outputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fxmpq.callbacks import MixedPrecisionCallback


class Regression(LightningModule):
    """A small network that writes down what its process ends up with."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
        self.folder = folder

    def validation_step(self, batch: Tensor) -> None:
        self.log("mean", self.model(batch).mean(), sync_dist=True)

    def on_validation_end(self) -> None:
        callback = next(c for c in self.trainer.callbacks if isinstance(c, MixedPrecisionCallback))
        assert self.model is callback.graph_module
        found = {
            "plan": callback.plan.to_json(),
            "outputs": self.model(torch.linspace(-2, 2, 32).reshape(4, 8)).tolist(),
        }
        (self.folder / f"rank{self.global_rank}.json").write_text(json.dumps(found))


class RankData:
    """Calibration batches that differ between processes."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = torch.Generator().manual_seed(rank)
        return iter([torch.randn(16, 8, generator=generator) * (1 + rank) for _ in range(3)])


def run(folder: Path, devices: int) -> None:
    """Validate on `devices` processes."""
    callback = MixedPrecisionCallback("reference", "weights=20%", calibration=RankData())
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        callbacks=[callback],
        default_root_dir=folder,
    )
    data = DataLoader([torch.full((8,), float(i)) for i in range(8)], batch_size=2)
    trainer.validate(Regression(folder), data, verbose=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), devices=2)
