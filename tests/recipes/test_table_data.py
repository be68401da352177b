from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

from fxmpq.recipes.schema import FilesData, HubData, RecipeError, TransformersModel
from fxmpq.recipes.table_data import Preprocessor, load_splits, preprocessor, to_batches

CLASSES = {"Bad": 0, "Good": 1}


def files(path: Path, **values: Any) -> FilesData:
    defaults: dict[str, Any] = {
        "source": "files",
        "format": "csv",
        "calibration": path,
        "test": path,
        "input_columns": ("text",),
        "calibration_samples": 4,
    }
    return FilesData(**{**defaults, **values})


def lengths(*columns: list[str]) -> dict[str, torch.Tensor]:
    """Stands in for a tokenizer: lengths of the texts."""
    return {
        "lengths": torch.tensor([[len(text) for text in row] for row in zip(*columns, strict=True)])
    }


def classes_of(labels: list[Any], feature: Any = None) -> list[int]:
    features = None if feature is None else datasets.Features({"label": feature})
    table = datasets.Dataset.from_dict({"label": labels}, features=features)
    return Preprocessor(lengths, ("text",), CLASSES).classes(table, "label").tolist()


def test_labels_are_numbers_or_the_models_names() -> None:
    assert classes_of([1, 0, 1]) == [1, 0, 1]
    assert classes_of(["good", "Bad"]) == [1, 0]
    # Known names win over numbers: this data set counts the other way round.
    assert classes_of([0, 1], datasets.ClassLabel(names=["good", "bad"])) == [1, 0]
    assert classes_of([0, 1], datasets.ClassLabel(names=["up", "down"])) == [0, 1]


@pytest.mark.parametrize(
    ("labels", "feature", "words"),
    [
        ([0, 2], None, "the label 2 .* 0 to 1"),
        (["god"], None, "the label 'god' .*'Good'"),
        ([0.5], None, "the label 0.5"),
        ([-1], datasets.ClassLabel(names=["good", "bad"]), "the label -1"),
    ],
)
def test_labels_that_are_no_class_are_refused(labels: list[Any], feature: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        classes_of(labels, feature)


@pytest.mark.parametrize("kind", ["json", "parquet", "hub"])
def test_files_and_folders_give_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
    if kind == "json":
        file = tmp_path / "rows.json"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        data: FilesData | HubData = files(file, format="json")
    elif kind == "parquet":
        file = tmp_path / "rows.parquet"
        datasets.Dataset.from_list(rows).to_parquet(file)
        data = files(file, format="parquet")
    else:
        home = tmp_path / "data"
        home.mkdir()
        for split in ("train", "validation"):
            datasets.Dataset.from_list(rows).to_csv(home / f"{split}.csv")
        data = HubData(source="hub", name=str(home), input_columns=("text",), calibration_samples=4)
    calibration, test = load_splits(data, seed=0)
    assert test.to_list() == rows
    assert len(calibration) == 4
    assert all(row in rows for row in calibration.to_list())


def test_samples_are_drawn_by_the_seed(csv_file: Path) -> None:
    data = files(csv_file, calibration_samples=8, test_samples=6)
    first, again, other = (load_splits(data, seed=seed) for seed in (1, 1, 2))
    assert first[0]["text"] == again[0]["text"]
    assert first[1]["label"] != other[1]["label"] or first[0]["label"] != other[0]["label"]
    assert len(first[1]) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calibration": Path("nowhere.csv")}, "no file or folder 'nowhere.csv'"),
        ({"input_columns": ("txt",)}, "no column 'txt'; closest: 'text'"),
        ({"label_column": "labels"}, "no column 'labels'; closest: 'label'"),
        ({"calibration_samples": 25}, "asked for 25 calibration samples; .* has 24"),
        ({"format": "parquet"}, "cannot load .*parquet"),
    ],
)
def test_data_that_is_not_there_is_explained(
    csv_file: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_splits(files(csv_file, **change), seed=0)


def test_an_unknown_hub_name_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = HubData(source="hub", name="nobody/nothing", config="c", input_columns=("text",))
    with pytest.raises(RecipeError, match=r"cannot load nobody/nothing \(c\), splits train and"):
        load_splits(data, seed=0)


def test_batches_hold_every_row_in_order() -> None:
    table = datasets.Dataset.from_dict(
        {"one": ["a", "bb", "ccc"], "two": ["dddd", "", "e"], "label": [0, 1, 1]}
    )
    prepare = Preprocessor(lengths, ("one", "two"), CLASSES)
    batches, labels = to_batches(table, prepare, 2, label="label")
    assert [batch["lengths"].tolist() for batch in batches] == [[[1, 4], [2, 0]], [[3, 1]]]
    assert labels.tolist() == [0, 1, 1]
    _, none = to_batches(table, prepare, 2)
    assert len(none) == 0


def test_rows_that_cannot_be_prepared_are_named() -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c", None]})
    prepare = Preprocessor(lengths, ("text",), CLASSES)
    with pytest.raises(RecipeError, match=r"cannot prepare rows 2 to 3 of column text: .*NoneType"):
        to_batches(table, prepare, 2)


def test_images_may_be_paths_in_a_table(
    resnet_folder: Path, resnet: nn.Module, image_folder: Path, tmp_path: Path
) -> None:
    paths = sorted(str(path) for path in image_folder.rglob("*.png"))[:3]
    table = datasets.Dataset.from_dict({"picture": paths})
    section = TransformersModel(
        source="transformers", name=str(resnet_folder), task="image-classification"
    )
    prepare = preprocessor(section, resnet, files(tmp_path, input_columns=("picture",)))
    batches, _ = to_batches(table, prepare, 8)
    assert batches[0]["pixel_values"].shape == (3, 3, 32, 32)


def test_what_does_not_suit_the_model_is_refused(
    bert_folder: Path, bert: nn.Module, resnet_folder: Path, resnet: nn.Module, tmp_path: Path
) -> None:
    text = TransformersModel(
        source="transformers", name=str(bert_folder), task="text-classification"
    )
    with pytest.raises(RecipeError, match="max_length is 64, but the model reads at most 12"):
        preprocessor(text, bert, files(tmp_path, max_length=64))
    image = TransformersModel(
        source="transformers", name=str(resnet_folder), task="image-classification"
    )
    with pytest.raises(RecipeError, match=r"one input column; .* names a, b"):
        preprocessor(image, resnet, files(tmp_path, input_columns=("a", "b")))
    nothing = TransformersModel(
        source="transformers", name=str(tmp_path), task="image-classification"
    )
    with pytest.raises(RecipeError, match="cannot load the image processor"):
        preprocessor(nothing, resnet, files(tmp_path))
