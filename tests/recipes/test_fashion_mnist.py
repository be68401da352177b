from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fxmpq.errors import FileFormatError
from fxmpq.recipes.fashion_mnist import (
    CLASSES,
    DataMissingError,
    embedded_subset,
    hold_out,
    normalise,
    read_split,
)


def write_idx(path: Path, array: npt.NDArray[np.uint8]) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()))


def write_split(folder: Path, split: str, images: int, labels: int) -> npt.NDArray[np.uint8]:
    values = np.random.default_rng(3).integers(0, 256, (images, 28, 28), dtype=np.uint8)
    write_idx(folder / f"{split}-images-idx3-ubyte.gz", values)
    write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(labels, dtype=np.uint8) % 10)
    return values


@pytest.mark.parametrize("split", ["train", "t10k"])
def test_read_split_returns_what_the_files_hold(tmp_path: Path, split: str) -> None:
    written = write_split(tmp_path, split, images=12, labels=12)
    images, labels = read_split(split, tmp_path)  # type: ignore[arg-type]
    assert images.shape == (12, 28, 28)
    np.testing.assert_array_equal(images, written)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_a_missing_folder_is_named_together_with_how_to_get_the_data(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="dataset-fashion-mnist") as raised:
        read_split("train", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "train-images-idx3-ubyte.gz") in str(raised.value)


def test_an_unknown_split_is_answered_with_the_two_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="'validation'; it has 'train' and 't10k'"):
        read_split("validation", tmp_path)  # type: ignore[arg-type]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", images=3, labels=3)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    labels.replace(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(FileFormatError, match="begins with 00 00 08 01; expected 00 00 08 03"):
        read_split("train", tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(FileFormatError, match="expected 00 00 08 03"):
        read_split("train", tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "t10k", images=3, labels=3)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(FileFormatError, match=r"\(3, 28, 28\), 2352 bytes, but holds 2351"):
        read_split("t10k", tmp_path)


def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(FileFormatError, match="no complete gzip file"):
        read_split("train", tmp_path)


def test_images_and_labels_must_be_as_many(tmp_path: Path) -> None:
    write_split(tmp_path, "t10k", images=3, labels=4)
    with pytest.raises(FileFormatError, match="3 images but 4 labels"):
        read_split("t10k", tmp_path)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)))
def test_normalise_can_be_undone(images: npt.NDArray[np.uint8]) -> None:
    normalised = normalise(images)
    assert normalised.dtype == torch.float32
    assert normalised.shape == (images.shape[0], 1, *images.shape[1:])
    grey = (normalised[:, 0].double() * 0.3530 + 0.2860) * 255
    np.testing.assert_array_equal(grey.round().numpy(), images)


def test_normalise_leaves_its_argument_alone() -> None:
    images = np.zeros((1, 2, 2), dtype=np.uint8)
    normalise(images).fill_(7.0)
    assert not images.any()


@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_hold_out_divides_the_images_and_takes_as_many_of_each_class(
    per_class: int, more: int, seed: int
) -> None:
    labels = np.concatenate([np.repeat(np.arange(10), per_class), np.arange(more) % 10])
    labels = np.random.default_rng(seed).permutation(labels).astype(np.uint8)
    kept, held = hold_out(labels, per_class)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert np.bincount(labels[held], minlength=10).tolist() == [per_class] * 10
    assert (np.diff(held) > 0).all()


def test_hold_out_is_the_same_everywhere() -> None:
    # The trained weights rest on this choice: a change of it would leak training images.
    _, held = hold_out((np.arange(1000) % 10).astype(np.uint8), per_class=1)
    assert held.tolist() == [103, 117, 225, 281, 364, 366, 368, 449, 562, 700]


def test_hold_out_names_the_class_that_is_too_small() -> None:
    labels = np.repeat(np.arange(10, dtype=np.uint8), 3)[:-1]
    with pytest.raises(DataMissingError, match=r"3 images of class 9 \(Ankle boot\): there are 2"):
        hold_out(labels, per_class=3)


def test_the_embedded_subset_has_the_promised_shapes_and_balance() -> None:
    subset = embedded_subset()
    assert subset.calibration_images.shape == (1024, 1, 28, 28)
    assert subset.test_images.shape == (4000, 1, 28, 28)
    assert subset.calibration_images.dtype == subset.test_images.dtype == torch.float32
    assert subset.calibration_labels.dtype == subset.test_labels.dtype == torch.int64
    per_class = subset.calibration_labels.bincount(minlength=len(CLASSES))
    assert per_class.tolist() == [103] * 4 + [102] * 6
    assert len(subset.test_labels) == 4000
    assert subset.test_labels.bincount(minlength=len(CLASSES)).min() >= 374


def test_the_embedded_images_are_normalised_and_all_different() -> None:
    subset = embedded_subset()
    for images in (subset.calibration_images, subset.test_images):
        assert abs(float(images.mean())) < 0.02
        assert abs(float(images.std()) - 1) < 0.02
    together = torch.cat([subset.calibration_images, subset.test_images]).flatten(1)
    assert len(together.unique(dim=0)) == len(together)
