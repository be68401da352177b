"""Trains a planned graph in two processes; run as a script by the test of the callback.

Each process writes its frozen graph's outputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxmpq
from fxmpq.callbacks import QuantizationAwareTraining

SAMPLES = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


class Regression(LightningModule):
    """A small network and a plain loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.model(batch) - batch[:, :4]).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Every process takes its part of each batch of eight; Lightning would shuffle them."""
        own = SAMPLES[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own, batch_size=8 // self.trainer.world_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def run(folder: Path, devices: int) -> None:
    """Train on `devices` processes and write what each ends up with."""
    module = Regression()
    graph = fxmpq.prepare(fxmpq.trace(module.model, SAMPLES), "reference", candidates=["w8a8"])
    graph = fxmpq.calibrate(graph, [SAMPLES], progress=False)
    choices = dict.fromkeys([g.name for g in fxmpq.graph.state.state_of(graph).groups], "w8a8")
    callback = QuantizationAwareTraining(graph, choices, distillation=0.5)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
    )
    trainer.fit(module)
    assert module.model is callback.graph_module
    with torch.no_grad():
        found = {"trained": module.model(SAMPLES).tolist(), "begun": graph(SAMPLES).tolist()}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), devices=2)
