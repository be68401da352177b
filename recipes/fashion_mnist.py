"""Fashion-MNIST: from its IDX files, and the small subset that comes with the recipes.

Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, https://arxiv.org/abs/1708.07747) is 60,000 training
and 10,000 test images, 28x28 grey, in ten classes of equal size; MIT licence.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxmpq.errors import FileFormatError, FxmpqError

Bytes = npt.NDArray[np.uint8]
DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SUBSET = "fashion_mnist_subset.npz"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
HELD_OUT_PER_CLASS = 500
_MEAN = 0.2860
_STD = 0.3530
_SEED = 20
_HOW_TO_GET_IT = (
    "On Debian or Ubuntu `apt-get install dataset-fashion-mnist` puts it into "
    f"{DEFAULT_FOLDER}; without root, `apt-get download dataset-fashion-mnist && dpkg -x "
    f"dataset-fashion-mnist_*.deb DIR` puts it into DIR{DEFAULT_FOLDER}, the folder to name here"
)


class DataMissingError(FxmpqError):
    """A data set, or enough of it, is not where it was looked for."""


@dataclass(frozen=True)
class Subset:
    """The images that come with the recipes, ready for the model.

    Attributes:
        calibration_images: float32 `[1024, 1, 28, 28]`, normalised; from the training side, and
            never trained on.
        calibration_labels: int64 `[1024]`.
        test_images: float32 `[4000, 1, 28, 28]`, normalised; the first 4,000 of the test set.
        test_labels: int64 `[4000]`.
    """

    calibration_images: Tensor
    calibration_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_split(
    split: Literal["train", "t10k"], folder: Path = DEFAULT_FOLDER
) -> tuple[Bytes, Bytes]:
    """Read one half of the whole data set from its gzipped IDX files.

    Args:
        split: `"train"` for the 60,000 training images, `"t10k"` for the 10,000 test images.
        folder: Where `train-images-idx3-ubyte.gz` and its three companions lie.

    Returns:
        Images uint8 `[n, 28, 28]` and labels uint8 `[n]`.

    Raises:
        DataMissingError: A file is not in the folder (the message says how to get the data set),
            or there is no such split.
        FileFormatError: A file is no IDX file of bytes, or images and labels differ in number.
    """
    if split not in ("train", "t10k"):
        raise DataMissingError(f"Fashion-MNIST has no split {split!r}; it has 'train' and 't10k'.")
    images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels):
        raise FileFormatError(
            f"The split {split!r} in {folder} holds {len(images)} images but {len(labels)} labels; "
            "the two files must come from the same release of the data set."
        )
    return images, labels


def _read_idx(path: Path, dimensions: int) -> Bytes:
    """Read an IDX file: two zero bytes, type 8 (uint8), rank, sizes (big-endian int32), data."""
    if not path.is_file():
        raise DataMissingError(f"No Fashion-MNIST file {path}. {_HOW_TO_GET_IT}.")
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FileFormatError(
            f"{path} is no complete gzip file ({error}): fetch it again."
        ) from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise FileFormatError(
            f"{path} begins with {content[:4].hex(' ')}; expected 00 00 08 {dimensions:02x}, the "
            f"header of an IDX file of bytes with {dimensions} dimension(s)."
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">i4"))
    data = np.frombuffer(content[start:], dtype=np.uint8)
    if data.size != np.prod(shape):
        raise FileFormatError(
            f"{path} announces the shape {shape}, {np.prod(shape)} bytes, but holds {data.size}; "
            "the file is cut off or damaged: fetch it again."
        )
    return data.reshape(shape)


def normalise(images: Bytes) -> Tensor:
    """Turn grey values into what the model takes: `(images / 255 - 0.2860) / 0.3530`.

    Args:
        images: uint8 `[n, h, w]`.

    Returns:
        float32 `[n, 1, h, w]`. The two constants are the mean and the standard deviation of the
        training images.

    Examples:
        >>> import numpy as np
        >>> from fxmpq.recipes.fashion_mnist import normalise
        >>> normalise(np.full((2, 28, 28), 255, dtype=np.uint8))[0, 0, 0, 0]
        tensor(2.0227)
    """
    # torch warns on arrays that cannot be written to, as those read from a file's bytes are.
    grey = torch.from_numpy(images.copy()).unsqueeze(1).to(torch.float32)
    return (grey / 255 - _MEAN) / _STD


def hold_out(
    labels: Bytes, per_class: int = HELD_OUT_PER_CLASS
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the training side into images to train on and images that no training ever sees.

    Args:
        labels: uint8 `[n]`, the labels of the training images in their original order.
        per_class: Number of images to hold out of each class.

    Returns:
        Two sorted int64 index arrays: those to train on, and the `10 * per_class` held out. The
        same for the same labels, everywhere and always.

    Raises:
        DataMissingError: A class has fewer than `per_class` images.

    Examples:
        >>> import numpy as np
        >>> from fxmpq.recipes.fashion_mnist import hold_out
        >>> kept, held = hold_out(np.arange(60, dtype=np.uint8) % 10, per_class=2)
        >>> len(kept), len(held)
        (40, 20)
    """
    # RandomState, as numpy promises to keep its stream the same in all versions.
    random = np.random.RandomState(_SEED)
    held = []
    for label in range(len(CLASSES)):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise DataMissingError(
                f"Cannot hold out {per_class} images of class {label} ({CLASSES[label]}): there "
                f"are {len(members)}."
            )
        held.append(random.permutation(members)[:per_class])
    held_out = np.sort(np.concatenate(held)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), held_out), held_out


def embedded_subset() -> Subset:
    """Read the 1,024 calibration and 4,000 test images that come with the recipes.

    Returns:
        The images normalised, with their labels. `recipes/assets/DATA_CARD.md` says where they
        are from.

    Examples:
        >>> from fxmpq.recipes.fashion_mnist import embedded_subset
        >>> embedded_subset().calibration_images.shape
        torch.Size([1024, 1, 28, 28])
    """
    asset = resources.files("fxmpq.recipes") / "assets" / SUBSET
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return Subset(
            calibration_images=normalise(arrays["calibration_images"]),
            calibration_labels=torch.from_numpy(arrays["calibration_labels"].astype(np.int64)),
            test_images=normalise(arrays["test_images"]),
            test_labels=torch.from_numpy(arrays["test_labels"].astype(np.int64)),
        )
