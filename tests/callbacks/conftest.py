"""A small classifier and its data, for runs of a real Trainer that take seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_accuracy

import fxmpq
from fxmpq.callbacks import MixedPrecisionCallback
from fxmpq.graph.state import state_of

CLASSES = 4
QUIET_TRAINER = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated",  # Lightning 2.6 and torch 2.13
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:Checkpoint directory .* exists and is not empty",
)
QUIET_RESUMING = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Classifier(LightningModule):
    """A convolutional network, and a scale in front of it that is not part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(72, CLASSES),
        )
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.mean_loss = MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.norm(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def _evaluate(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("batches_begun", 1.0, reduce_fx="sum")
        logits = self(images)
        self.accuracy(logits, labels)
        self.mean_loss(nn.functional.cross_entropy(logits, labels), len(labels))
        self.log_dict({"accuracy": self.accuracy, "loss": self.mean_loss})

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


class Blobs(LightningDataModule):
    """Noisy copies of one 8x8 picture per class."""

    def __init__(self, samples: int = 128, batch_size: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        pictures = torch.randn(CLASSES, 1, 8, 8, generator=generator)
        labels = torch.arange(2 * samples) % CLASSES
        noise = torch.randn(2 * samples, 1, 8, 8, generator=generator)
        self.images, self.labels = pictures[labels] + noise, labels
        self.samples, self.batch_size = samples, batch_size

    def _loader(self, part: slice, shuffle: bool) -> DataLoader[Any]:
        dataset = TensorDataset(self.images[part], self.labels[part])
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(slice(None, self.samples), shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(slice(self.samples, None), shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(slice(self.samples, 3 * self.samples // 2), shuffle=False)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.test_dataloader()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    module = Classifier()
    with torch.no_grad():  # statistics that batch norms have after training, not 0 and 1
        for norm in (module.norm, module.model[1]):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return module


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes Trainers for the CPU that write nothing outside the test's own folder."""

    def make(**settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **settings})

    return make


def _low_bits(**settings: Any) -> MixedPrecisionCallback:
    """At these bits the metrics differ visibly from the float ones."""
    return MixedPrecisionCallback(
        **{
            "target": "reference",
            "budget": "avg_weight_bits=3",
            "candidates": ["w2a4", "w4a8"],
            "calibration_batches": 4,
            **settings,
        }
    )


@pytest.fixture
def low_bits() -> Callable[..., MixedPrecisionCallback]:
    return _low_bits


def _by_hand(
    module: LightningModule, network: nn.Module, loader: DataLoader[Any]
) -> dict[str, float]:
    """The metrics of a network in the module's place, without Lightning."""
    module.eval()
    with torch.no_grad():
        logits = torch.cat([network(module.norm(images)) for images, _ in loader])
        labels = torch.cat([labels for _, labels in loader])
        return {
            "accuracy": multiclass_accuracy(logits, labels, 4, average="micro").item(),
            "loss": nn.functional.cross_entropy(logits, labels).item(),
            "batches_begun": float(len(loader)),
        }


@pytest.fixture
def by_hand() -> Callable[..., dict[str, float]]:
    return _by_hand


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same tensors, bit for bit."""
    ones, others = one.state_dict(), other.state_dict()
    return list(ones) == list(others) and all(torch.equal(ones[n], others[n]) for n in ones)


@pytest.fixture
def equal() -> Callable[[nn.Module, nn.Module], bool]:
    return _equal


MakeTrainer = Callable[..., Trainer]


class KilledError(Exception):
    """Stands for what ends a run before its time."""


class StopsAfter(Callback):
    """Raises when a number of epochs is over, after the checkpoint is written."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epochs:
            raise KilledError


@pytest.fixture
def graph(classifier: Any, blobs: Any) -> fx.GraphModule:
    """Calibrated on what the classifier's network receives."""
    classifier.eval()
    with torch.no_grad():
        batches = [classifier.norm(images) for images, _ in blobs.val_dataloader()]
    traced = fxmpq.prepare(
        fxmpq.trace(classifier.model, batches[0]), "reference", candidates=["w2a8", "w4a8"]
    )
    classifier.train()
    return fxmpq.calibrate(traced, batches, progress=False)


@pytest.fixture
def plan(graph: fx.GraphModule) -> dict[str, str]:
    names = [group.name for group in state_of(graph).groups]
    return {name: ("w4a8", "w2a8")[index % 2] for index, name in enumerate(names)}


def fit(
    make_trainer: MakeTrainer, module: Any, data: Any, *callbacks: Callback, **more: Any
) -> Any:
    torch.manual_seed(1)
    ckpt_path = more.pop("ckpt_path", None)
    trainer = make_trainer(**{"max_epochs": 2, **more}, callbacks=list(callbacks))
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def outputs(network: nn.Module, data: Any) -> Tensor:
    with torch.no_grad():
        return network(data.images[:32])
