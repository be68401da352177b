"""Loading what a recipe names: a trained model, calibration batches, and test batches."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from torch import Tensor, nn

from fxmpq.graph.batches import Batch
from fxmpq.recipes.fashion_mnist import embedded_subset
from fxmpq.recipes.models.resnet20 import pretrained
from fxmpq.recipes.schema import (
    LANGUAGE,
    EmbeddedData,
    EmbeddedModel,
    FilesData,
    HubData,
    Recipe,
    RecipeError,
    Task,
    TransformersModel,
)
from fxmpq.recipes.table_data import load_splits, preprocessor, to_batches
from fxmpq.recipes.token_sequences import load_sequences
from fxmpq.recipes.token_sequences import to_batches as sequence_batches
from fxmpq.sensitivity.measure import METHODS

_CLASSES = {
    "image-classification": transformers.AutoModelForImageClassification,
    "text-classification": transformers.AutoModelForSequenceClassification,
    LANGUAGE: transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class Loaded:
    """A recipe's model and data, ready to run.

    Args:
        model: In evaluation mode.
        calibration: Batches of what the model takes.
        calibration_labels: Classes of the calibration samples, or a language model's token ids,
            int64; empty unless the recipe's method needs them.
        test: Batches of what the model takes.
        labels: The same of the test samples.
        model_text: Which model, for people.
        data_text: Which data, for people.
        metric: What is measured on the test samples, a key of `METRICS`.
    """

    model: nn.Module
    calibration: list[Batch]
    calibration_labels: Tensor
    test: list[Batch]
    labels: Tensor
    model_text: str
    data_text: str
    metric: str = "accuracy"


def load(recipe: Recipe) -> Loaded:
    """Load a recipe's model and data.

    Args:
        recipe: From `read_recipe`.

    Returns:
        Both, with calibration samples drawn by the recipe's seed.

    Raises:
        RecipeError: If something is not there, cannot be read, or does not fit.
    """
    if isinstance(recipe.model, EmbeddedModel):
        assert isinstance(recipe.data, EmbeddedData)
        return _load_embedded(recipe.data)
    assert not isinstance(recipe.data, EmbeddedData)
    model = load_transformers_model(recipe.model)
    if recipe.model.task == LANGUAGE:
        return _load_language(recipe.model, model, recipe.data, recipe)
    prepare = preprocessor(recipe.model, model, recipe.data)
    calibration, test = load_splits(recipe.data, recipe.seed)
    size = recipe.data.batch_size
    test_batches, labels = to_batches(test, prepare, size, label=recipe.data.label_column)
    wanted = recipe.data.label_column if METHODS[recipe.method].labels else None
    calibration_batches, calibration_labels = to_batches(calibration, prepare, size, label=wanted)
    return Loaded(
        model,
        calibration_batches,
        calibration_labels,
        test_batches,
        labels,
        model_text=f"{recipe.model.name} ({type(model).__name__})",
        data_text=recipe.data.describe(),
    )


def load_transformers_model(section: TransformersModel) -> nn.Module:
    """Load a model from the hub or a local folder, from safetensors only.

    Args:
        section: Of the recipe.

    Returns:
        The model in evaluation mode, in float32.

    Raises:
        RecipeError: If it is not found or has no safetensors weights.
    """
    loader = _CLASSES[section.task]
    try:
        # Never code from the hub, never pickled weights.
        model: nn.Module = loader.from_pretrained(
            section.name,
            revision=section.revision,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32",
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot load the model {section.name!r} for {_article(section.task)}: "
            f"{_first_line(error)}\nName a model on the hub or a folder written by "
            "save_pretrained, with weights in safetensors"
        ) from error
    return model.eval()


def _load_language(
    section: TransformersModel, model: nn.Module, data: HubData | FilesData, recipe: Recipe
) -> Loaded:
    calibration, test = load_sequences(section, model, data, recipe.seed)
    is_labelled = METHODS[recipe.method].labels
    return Loaded(
        model,
        sequence_batches(calibration, data.batch_size),
        calibration if is_labelled else calibration[:0],
        sequence_batches(test, data.batch_size),
        test,
        model_text=f"{section.name} ({type(model).__name__})",
        data_text=data.describe(),
        metric="perplexity",
    )


def _load_embedded(data: EmbeddedData) -> Loaded:
    subset = embedded_subset()
    available = len(subset.calibration_images)
    if data.calibration_samples > available:
        raise RecipeError(
            f"asked for {data.calibration_samples} calibration samples; the embedded data has "
            f"{available}"
        )
    # The classes take turns, so that any number of first images is balanced.
    calibration = subset.calibration_images[: data.calibration_samples]
    test = slice(data.test_samples)
    return Loaded(
        pretrained(),
        _split(calibration, data.batch_size),
        subset.calibration_labels[: data.calibration_samples],
        _split(subset.test_images[test], data.batch_size),
        subset.test_labels[test],
        model_text="ResNet-20, trained on Fashion-MNIST by this project",
        data_text="Fashion-MNIST, the subset that comes with fxmpq",
    )


def _split(images: Tensor, size: int) -> list[Batch]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _article(task: Task) -> str:
    return f"{'an' if task[0] in 'aeiou' else 'a'} {task} task"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
