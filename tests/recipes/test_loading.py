from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.loading import Loaded, load, load_transformers_model
from fxmpq.recipes.schema import RecipeError, TransformersModel, read_recipe


def load_recipe(**content: Any) -> Loaded:
    return load(read_recipe({"budget": "weights=15%", **content}))


def test_the_embedded_model_and_images_are_taken_in_order() -> None:
    data = {"source": "embedded", "calibration_samples": 100, "test_samples": 50, "batch_size": 40}
    loaded = load_recipe(model={"source": "embedded"}, data=data)
    subset = embedded_subset()
    assert [len(batch) for batch in loaded.calibration] == [40, 40, 20]
    assert torch.equal(torch.cat(loaded.calibration), subset.calibration_images[:100])
    assert torch.equal(torch.cat(loaded.test), subset.test_images[:50])
    assert torch.equal(loaded.labels, subset.test_labels[:50])
    with torch.no_grad():
        right = loaded.model(torch.cat(loaded.test)).argmax(dim=1) == loaded.labels
    assert right.float().mean() > 0.8  # it is trained
    assert not loaded.model.training


def test_more_embedded_images_than_there_are_is_an_error() -> None:
    data = {"source": "embedded", "calibration_samples": 1025}
    with pytest.raises(RecipeError, match=r"asked for 1025 .* has 1024"):
        load_recipe(model={"source": "embedded"}, data=data)


def test_a_text_classifier_and_its_csv_file(
    bert_folder: Path, bert: nn.Module, csv_file: Path
) -> None:
    loaded = load_recipe(
        model={
            "source": "transformers",
            "name": str(bert_folder),
            "task": "text-classification",
        },
        data={
            "source": "files",
            "format": "csv",
            "calibration": csv_file,
            "test": csv_file,
            "input_columns": ["text"],
            "max_length": 8,
            "calibration_samples": 10,
            "batch_size": 4,
        },
    )
    assert [len(batch["input_ids"]) for batch in loaded.calibration] == [4, 4, 2]
    assert loaded.labels.tolist() == [1] * 12 + [0] * 12  # the model's Good is 1, Bad is 0
    batch = loaded.test[0]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    assert all(tensor.shape == (4, 8) for tensor in batch.values())
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, bert(**batch).logits)
    assert "BertForSequenceClassification" in loaded.model_text


def test_an_image_classifier_and_its_image_folder(
    resnet_folder: Path, resnet: nn.Module, image_folder: Path
) -> None:
    loaded = load_recipe(
        model={
            "source": "transformers",
            "name": str(resnet_folder),
            "task": "image-classification",
        },
        data={
            "source": "files",
            "format": "imagefolder",
            "calibration": image_folder,
            "test": image_folder,
            "input_columns": ["image"],
            "calibration_samples": 5,
            "test_samples": 7,
            "batch_size": 4,
        },
    )
    assert [tuple(batch["pixel_values"].shape) for batch in loaded.test] == [
        (4, 3, 32, 32),
        (3, 3, 32, 32),
    ]
    assert set(loaded.labels.tolist()) == {0, 1}  # drawn at random, not the first class alone
    pixels: Tensor = loaded.calibration[0]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(loaded.model(pixels).logits, resnet(pixels).logits)


@pytest.mark.parametrize("name", ["no/such-folder", "empty"])
def test_a_model_that_is_not_there_is_explained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    section = TransformersModel(source="transformers", name=name, task="image-classification")
    with pytest.raises(RecipeError, match=f"cannot load the model '{name}' for an image-class"):
        load_transformers_model(section)


def test_pickled_weights_are_refused(resnet: nn.Module, tmp_path: Path) -> None:
    resnet.config.save_pretrained(tmp_path)
    torch.save(resnet.state_dict(), tmp_path / "pytorch_model.bin")
    section = TransformersModel(
        source="transformers", name=str(tmp_path), task="image-classification"
    )
    with pytest.raises(RecipeError, match="safetensors"):
        load_transformers_model(section)
