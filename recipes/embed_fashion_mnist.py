"""Make the subset of Fashion-MNIST that comes with the recipes, again and the same.

Run as `python -m fxmpq.recipes.embed_fashion_mnist --data DIR --output FILE`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from fxmpq.recipes.fashion_mnist import (
    CLASSES,
    DEFAULT_FOLDER,
    SUBSET,
    Bytes,
    hold_out,
    read_split,
)

CALIBRATION_IMAGES = 1024
TEST_IMAGES = 4000
_ASSET = Path(__file__).resolve().parent / "assets" / SUBSET


def choose_calibration(
    images: Bytes, labels: Bytes, count: int = CALIBRATION_IMAGES
) -> tuple[Bytes, Bytes]:
    """Choose calibration images from the held-out ones, the classes in turn.

    Args:
        images: All training images, uint8 `[n, h, w]`, in their original order.
        labels: Their labels, uint8 `[n]`.
        count: Number of images to choose, at most as many as are held out.

    Returns:
        Images uint8 `[count, h, w]` and labels uint8 `[count]`, ordered class 0, 1, ..., 9, 0, 1,
        ...: any stretch of them is balanced, and no two class sizes differ by more than one.
    """
    _, held = hold_out(labels)
    # Row i holds the i-th held-out image of every class, so reading row by row takes turns.
    turns = np.stack([held[labels[held] == label] for label in range(len(CLASSES))], axis=1)
    chosen = turns.reshape(-1)[:count]
    return images[chosen], labels[chosen]


def subset_archive(data: Path) -> bytes:
    """Return the content of `fashion_mnist_subset.npz`, made from the whole data set in `data`.

    Args:
        data: Folder of the four IDX files.

    Returns:
        A compressed NumPy archive of uint8 arrays: `calibration_images [1024, 28, 28]` with
        `calibration_labels [1024]`, and `test_images [4000, 28, 28]` with `test_labels [4000]`.
        Equal input gives equal bytes, with one and the same version of zlib.

    Raises:
        DataMissingError: The data set is not in `data`.
        FileFormatError: One of its files is damaged.
    """
    calibration_images, calibration_labels = choose_calibration(*read_split("train", data))
    test_images, test_labels = read_split("t10k", data)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        calibration_images=calibration_images,
        calibration_labels=calibration_labels,
        test_images=test_images[:TEST_IMAGES],
        test_labels=test_labels[:TEST_IMAGES],
    )
    return buffer.getvalue()


def main(
    data: Annotated[Path, typer.Option(help="Folder of the IDX files.")] = DEFAULT_FOLDER,
    output: Annotated[Path, typer.Option(help="Where to write the archive.")] = _ASSET,
) -> None:
    """Write the embedded subset of Fashion-MNIST."""
    archive = subset_archive(data)
    output.write_bytes(archive)
    typer.echo(f"wrote {len(archive):,} bytes to {output}")


if __name__ == "__main__":
    typer.run(main)
