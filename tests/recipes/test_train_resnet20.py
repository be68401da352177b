from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from fxmpq.errors import FileFormatError
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import ResNet20
from fxmpq.recipes.train_resnet20 import (
    ResNet20Training,
    Settings,
    augment,
    main,
    save_checkpoint,
    train,
)


def few(count: int, side: int = 28) -> TensorDataset:
    subset = embedded_subset()
    return TensorDataset(
        subset.calibration_images[:count, :, :side, :side], subset.calibration_labels[:count]
    )


def tiny(epochs: int = 2) -> Settings:
    return Settings(epochs=epochs, batch_size=16)


@given(st.integers(1, 5), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2**31))
def test_augmented_images_are_windows_of_the_padded_image_or_its_mirror(
    count: int, channels: int, padding: int, seed: int
) -> None:
    torch.manual_seed(seed)
    images = torch.randn(count, channels, 4, 5)
    augmented = augment(images, padding)
    assert augmented.shape == images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4, value=float(images.min()))
    mirrored = torch.nn.functional.pad(images.flip(-1), [padding] * 4, value=float(images.min()))
    for got, straight, flipped in zip(augmented, padded, mirrored, strict=True):
        windows = [
            source[:, top : top + 4, left : left + 5]
            for source in (straight, flipped)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
        ]
        assert any(got.equal(window) for window in windows)


def test_augmentation_uses_every_shift_and_both_directions() -> None:
    torch.manual_seed(0)
    image = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)
    augmented = augment(image.expand(400, 1, 3, 3), padding=1)
    assert len(augmented.flatten(1).unique(dim=0)) == 2 * 3 * 3


def test_training_learns_and_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    images = few(128)
    settings = Settings(epochs=6, batch_size=16, learning_rate=0.05)
    model, accuracy = train(images, images, images, settings, tmp_path / "first")
    assert accuracy > 0.3  # guessing reaches 0.1
    assert not model.training
    again, _ = train(images, images, images, settings, tmp_path / "second")
    for name, value in model.state_dict().items():
        assert value.equal(again.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_an_interrupted_training_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def note(self: ResNet20Training) -> None:
        started.append(self.current_epoch)
        if started == [0, 1]:
            raise OSError("the machine goes down")

    monkeypatch.setattr(ResNet20Training, "on_train_epoch_start", note)
    images = few(32, side=8)
    with pytest.raises(OSError, match="goes down"):
        train(images, images, images, tiny(epochs=3), tmp_path)
    train(images, images, images, tiny(epochs=3), tmp_path)
    assert started == [0, 1, 1, 2]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_it_does_not_go_on_from_a_training_with_other_settings(tmp_path: Path) -> None:
    images = few(32, side=8)
    train(images, images, images, tiny(epochs=1), tmp_path)
    with pytest.raises(FileFormatError, match=r"'epochs': 1.*'epochs': 2.*delete its folder"):
        train(images, images, images, tiny(epochs=2), tmp_path)


def test_a_saved_checkpoint_loads_into_a_new_model(tmp_path: Path) -> None:
    model = ResNet20Training(Settings()).model
    save_checkpoint(model, tmp_path / "new" / "model.safetensors")
    other = ResNet20()
    other.load_state_dict(load_file(tmp_path / "new" / "model.safetensors"))
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_main_trains_on_a_folder_of_idx_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 5000 + 160), ("t10k", 30)):
        images = np.random.default_rng(1).integers(0, 256, (count, 4, 4), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
            (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    output = tmp_path / "model.safetensors"
    main(output=output, data=tmp_path, epochs=1)
    assert "on 30 images" in capsys.readouterr().out
    state = load_file(output)
    assert state["bn.num_batches_tracked"] == 1  # 160 images make one whole batch of 128
    assert not output.with_name(output.name + ".progress").exists()
