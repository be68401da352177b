"""Train the ResNet-20 whose weights come with the recipes.

Run as `python -m fxmpq.recipes.train_resnet20 --data DIR --output FILE`. On one thread of a
present-day server processor the 22 epochs take about 50 minutes.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from fxmpq.errors import FileFormatError
from fxmpq.recipes.fashion_mnist import DEFAULT_FOLDER, hold_out, normalise, read_split
from fxmpq.recipes.models.resnet20 import ResNet20

_LOG = logging.getLogger("lightning.pytorch")
_CLASSES = 10

Labelled = TensorDataset


@dataclass(frozen=True)
class Settings:
    """What the training is made of.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: The one-cycle schedule's highest rate.
        weight_decay: L2 penalty on all parameters.
        label_smoothing: Share of the target spread over all classes.
        crop_padding: Pixels a training image may be shifted by, in each direction.
        seed: Seeds the initial weights, the order of the images and their augmentation.
    """

    epochs: int = 22
    batch_size: int = 128
    learning_rate: float = 0.15
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    crop_padding: int = 2
    seed: int = 20


def augment(images: Tensor, padding: int) -> Tensor:
    """Flip half of the images left to right and shift each one, both at random.

    Args:
        images: Float `[n, c, h, w]`.
        padding: Each image is padded by this many of its smallest value on every side, and a
            window of its old size is cut out anywhere.

    Returns:
        Float `[n, c, h, w]`; the random numbers are those of torch's global generator.

    Examples:
        >>> import torch
        >>> from fxmpq.recipes.train_resnet20 import augment
        >>> augment(torch.rand(4, 1, 28, 28), padding=2).shape
        torch.Size([4, 1, 28, 28])
    """
    count, _, height, width = images.shape
    flips = torch.rand(count, device=images.device) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    pad = [padding] * 4
    padded = nn.functional.pad(images, pad, value=float(images.min()))
    down, right = torch.randint(0, 2 * padding + 1, (2, count), device=images.device)
    rows = (down[:, None] + torch.arange(height, device=images.device))[:, :, None]
    columns = (right[:, None] + torch.arange(width, device=images.device))[:, None, :]
    which = torch.arange(count, device=images.device)[:, None, None]
    # Indices around the channel slice put the channels last: [n, h, w, c].
    return padded[which, :, rows, columns].permute(0, 3, 1, 2)


class ResNet20Training(LightningModule):
    """The training, validation and test steps of a `ResNet20`, with top-1 accuracy.

    Args:
        settings: What the training is made of.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.model = ResNet20()
        # Channels last makes a step on a CPU a quarter faster. torch's types leave it out.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.accuracy = MulticlassAccuracy(_CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images `[n, 1, h, w]` to logits `[n, 10]`."""
        logits: Tensor = self.model(images.contiguous(memory_format=torch.channels_last))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of one augmented batch `[images, labels]`."""
        images, labels = batch
        loss: Tensor = self.loss(self(augment(images, self.settings.crop_padding)), labels)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Add one batch to `val_accuracy`."""
        self._add_to_accuracy("val_accuracy", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Add one batch to `test_accuracy`."""
        self._add_to_accuracy("test_accuracy", batch)

    def _add_to_accuracy(self, name: str, batch: list[Tensor]) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log(name, self.accuracy, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Log one line an epoch: there is no progress bar, so that a log file stays short."""
        if not self.trainer.sanity_checking:
            accuracy = float(self.accuracy.compute())
            _LOG.info("epoch %d: held-out accuracy %.4f", self.current_epoch + 1, accuracy)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD with Nesterov momentum 0.9 under a one-cycle schedule, stepped each batch."""
        settings = self.settings
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=settings.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=settings.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=0.2,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the settings, as only the same training can go on from there."""
        checkpoint["settings"] = asdict(self.settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from another training.

        Raises:
            FileFormatError: The checkpoint's settings are not this module's.
        """
        found = checkpoint.get("settings")
        if found != asdict(self.settings):
            raise FileFormatError(
                f"The training to go on from has the settings {found}, this one has "
                f"{asdict(self.settings)}. Use the same settings, or delete its folder to start "
                "anew."
            )


def train(
    training: Labelled, held_out: Labelled, test: Labelled, settings: Settings, progress: Path
) -> tuple[ResNet20, float]:
    """Train a ResNet-20 and look at the test images once, at the end.

    Args:
        training: Normalised images `[n, 1, h, w]` and int64 labels `[n]` to train on.
        held_out: Images whose accuracy is logged after each epoch; they choose nothing.
        test: Images for the final figure.
        settings: What the training is made of.
        progress: A folder for `last.ckpt`, written after each epoch. Where it exists, training
            goes on from it; the random numbers then differ from those of an unbroken run.

    Returns:
        The model in evaluation mode and its accuracy on `test`, in [0, 1].

    Raises:
        FileFormatError: The training in `progress` has other settings.
    """
    seed_everything(settings.seed, verbose=False)
    # Without a monitored metric the one checkpoint kept is that of the latest epoch.
    latest = ModelCheckpoint(progress, "last", save_top_k=1, enable_version_counter=False)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=settings.epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[latest],
    )
    module = ResNet20Training(settings)
    last = progress / "last.ckpt"
    trainer.fit(
        module,
        DataLoader(training, settings.batch_size, shuffle=True, drop_last=True),
        DataLoader(held_out, 500),
        ckpt_path=last if last.is_file() else None,
        weights_only=True,
    )
    (metrics,) = trainer.test(module, DataLoader(test, 500), verbose=False)
    return module.model.eval(), metrics["test_accuracy"]


def save_checkpoint(model: nn.Module, output: Path) -> None:
    """Write the model's state as safetensors, under its name only once it is complete."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".part")
    unfinished.write_bytes(save(state))
    unfinished.replace(output)


def main(
    output: Annotated[Path, typer.Option(help="Where to write the safetensors file.")],
    data: Annotated[Path, typer.Option(help="Folder of the IDX files.")] = DEFAULT_FOLDER,
    epochs: Annotated[int, typer.Option(min=1)] = Settings.epochs,
    seed: int = Settings.seed,
) -> None:
    """Train on 55,000 images, hold 5,000 out, test on 10,000, and write the weights."""
    images, labels = read_split("train", data)
    test_images, test_labels = read_split("t10k", data)
    kept, held = hold_out(labels)
    normalised, targets = normalise(images), torch.tensor(labels, dtype=torch.int64)
    progress = output.with_name(output.name + ".progress")
    model, accuracy = train(
        training=Labelled(normalised[kept], targets[kept]),
        held_out=Labelled(normalised[held], targets[held]),
        test=Labelled(normalise(test_images), torch.tensor(test_labels, dtype=torch.int64)),
        settings=Settings(epochs=epochs, seed=seed),
        progress=progress,
    )
    save_checkpoint(model, output)
    shutil.rmtree(progress)
    typer.echo(f"test accuracy {accuracy:.2%} on {len(test_labels):,} images; wrote {output}")


if __name__ == "__main__":
    typer.run(main)
