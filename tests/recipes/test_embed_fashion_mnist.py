from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.recipes.embed_fashion_mnist import (
    CALIBRATION_IMAGES,
    TEST_IMAGES,
    choose_calibration,
    main,
    subset_archive,
)
from fxmpq.recipes.fashion_mnist import Bytes, embedded_subset, hold_out

ASSETS = resources.files("fxmpq.recipes") / "assets"


def numbered(count: int) -> tuple[Bytes, Bytes]:
    """Images whose four pixels spell their index, with labels in a seeded order."""
    images = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 2, 2)
    labels = np.random.default_rng(5).permutation(np.arange(count) % 10).astype(np.uint8)
    return images, labels


def index_of(images: Bytes) -> list[int]:
    indices: list[int] = images.reshape(-1, 4).copy().view(">u4").reshape(-1).tolist()
    return indices


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion-mnist")
    for split, count in (("train", 6000), ("t10k", TEST_IMAGES + 10)):
        images, labels = numbered(count)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


@given(st.integers(1, 5000))
def test_calibration_images_are_held_out_ones_with_the_classes_in_turn(count: int) -> None:
    images, labels = numbered(6000)
    chosen, their_labels = choose_calibration(images, labels, count)
    indices = index_of(chosen)
    assert len(set(indices)) == count
    assert set(indices) <= set(hold_out(labels)[1].tolist())
    assert labels[indices].tolist() == their_labels.tolist() == [i % 10 for i in range(count)]


def test_the_archive_holds_plain_arrays_of_the_promised_size(data: Path) -> None:
    with np.load(io.BytesIO(subset_archive(data)), allow_pickle=False) as arrays:
        found = dict(arrays)
    test_images, test_labels = numbered(TEST_IMAGES + 10)
    assert {array.dtype for array in found.values()} == {np.dtype(np.uint8)}
    assert found["calibration_images"].shape == (CALIBRATION_IMAGES, 2, 2)
    assert found["calibration_labels"].shape == (CALIBRATION_IMAGES,)
    np.testing.assert_array_equal(found["test_images"], test_images[:TEST_IMAGES])
    np.testing.assert_array_equal(found["test_labels"], test_labels[:TEST_IMAGES])


def test_the_archive_is_the_same_at_any_time(data: Path) -> None:
    archive = subset_archive(data)
    assert archive == subset_archive(data)
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        assert {entry.date_time for entry in entries.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_main_writes_the_archive(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(data, tmp_path / "subset.npz")
    written = (tmp_path / "subset.npz").read_bytes()
    assert written == subset_archive(data)
    assert f"wrote {len(written):,} bytes" in capsys.readouterr().out


def test_the_committed_file_is_the_one_its_card_describes() -> None:
    content = (ASSETS / "fashion_mnist_subset.npz").read_bytes()
    card = (ASSETS / "DATA_CARD.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in card
    assert f"({len(content):,} bytes)" in card


def test_the_committed_file_was_made_by_these_rules() -> None:
    subset = embedded_subset()
    assert subset.calibration_labels.tolist() == [i % 10 for i in range(CALIBRATION_IMAGES)]
    assert len(subset.test_images) == TEST_IMAGES
