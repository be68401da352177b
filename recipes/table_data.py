"""Data sets as tables of samples: from the hub or from local files to batches for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]  # it ships no types
import torch
import transformers
from torch import Tensor, nn

from fxmpq.errors import closest
from fxmpq.graph.batches import Batch
from fxmpq.recipes.schema import FilesData, HubData, RecipeError, TransformersModel

Rows = Mapping[str, Sequence[Any]]


class Preprocessor:
    """Turns rows of a table into a model's keyword arguments, and labels into its classes.

    Args:
        inputs: Makes tensors of a column of images, or of one or two columns of texts.
        columns: The input columns.
        classes: The model's classes: numbers by name.
        decode: Prepares a table before rows are read from it.
    """

    def __init__(
        self,
        inputs: Callable[..., Mapping[str, Tensor]],
        columns: tuple[str, ...],
        classes: Mapping[str, int],
        decode: Callable[[datasets.Dataset], datasets.Dataset] = lambda table: table,
    ) -> None:
        self.columns = columns
        self.decode = decode
        self._inputs = inputs
        self._classes = classes

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """Make one batch of rows into tensors by argument name."""
        found = self._inputs(*(list(rows[column]) for column in self.columns))
        return {name: torch.as_tensor(value) for name, value in found.items()}

    def classes(self, table: datasets.Dataset, column: str) -> Tensor:
        """Read a column of class numbers or names.

        Names are looked up in the model's configuration, in any case of letters, those of a
        `ClassLabel` column too if the model knows them all; numbers are taken as they are.

        Raises:
            RecipeError: If a label is no class of the model.
        """
        known = {name.casefold(): number for name, number in self._classes.items()}
        labels = list(table[column])
        feature = table.features[column]
        if isinstance(feature, datasets.ClassLabel):
            told = [name.casefold() for name in feature.names]
            if set(told) <= set(known):
                labels = [told[label] if label >= 0 else label for label in labels]
        classes = []
        for label in labels:
            number = known.get(label.casefold()) if isinstance(label, str) else label
            if not isinstance(number, int) or number not in known.values():
                raise RecipeError(
                    f"the label {label!r} in column {column!r} is no class of the model; it has "
                    f"0 to {len(known) - 1}, or {closest(str(label), self._classes)}. Map the "
                    "labels, or name another split or column"
                )
            classes.append(number)
        return torch.tensor(classes, dtype=torch.int64)


def preprocessor(
    section: TransformersModel, model: nn.Module, data: HubData | FilesData
) -> Preprocessor:
    """Load the image processor or tokenizer that belongs to a model.

    Args:
        section: The model's part of the recipe.
        model: The model.
        data: The data's part of the recipe.

    Returns:
        What makes batches for the model.

    Raises:
        RecipeError: If there is none, or the input columns do not suit the task.
    """
    config = model.config
    assert isinstance(config, transformers.PretrainedConfig)
    classes = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if section.task == "text-classification":
        tokenizer = from_pretrained(transformers.AutoTokenizer, "tokenizer", section)
        longest = getattr(config, "max_position_embeddings", data.max_length)
        if data.max_length > longest:
            raise RecipeError(
                f"data.max_length is {data.max_length}, but the model reads at most {longest} "
                "tokens"
            )

        def tokens(*texts: list[str]) -> Mapping[str, Tensor]:
            found: Mapping[str, Tensor] = tokenizer(
                *texts,
                padding="max_length",
                truncation=True,
                max_length=data.max_length,
                return_tensors="pt",
            )
            return found

        return Preprocessor(tokens, data.input_columns, classes)
    if len(data.input_columns) != 1:
        raise RecipeError(
            f"an image model takes one input column; data.input_columns names "
            f"{', '.join(data.input_columns)}"
        )
    processor = from_pretrained(transformers.AutoImageProcessor, "image processor", section)
    (column,) = data.input_columns
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def pixels(images: list[Any]) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = processor(
            images=[image.convert(mode) for image in images], return_tensors="pt"
        )
        return found

    def decode(table: datasets.Dataset) -> datasets.Dataset:
        # Paths and encoded bytes, as csv, json and parquet files hold them, become images.
        return table.cast_column(column, datasets.Image())

    return Preprocessor(pixels, data.input_columns, classes, decode)


def load_splits(data: HubData | FilesData, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load calibration and test samples, drawn at random where not all are used.

    Args:
        data: The data's part of the recipe.
        seed: Seeds the drawing.

    Returns:
        The calibration and the test table.

    Raises:
        RecipeError: If data or columns are not there, or there are too few samples.
    """
    calibration, test = load_tables(data)
    if len(calibration) < data.calibration_samples:
        raise RecipeError(
            f"asked for {data.calibration_samples} calibration samples; {data.describe()} has "
            f"{len(calibration)}"
        )
    wanted = len(test) if data.test_samples is None else min(data.test_samples, len(test))
    return _draw(calibration, data.calibration_samples, seed), _draw(test, wanted, seed)


def load_tables(
    data: HubData | FilesData, *, labelled: bool = True
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Load all calibration and all test samples.

    Args:
        data: The data's part of the recipe.
        labelled: Whether the test samples must have labels.

    Returns:
        The calibration and the test table.

    Raises:
        RecipeError: If data or columns are not there.
    """
    try:
        if isinstance(data, HubData):
            calibration, test = (
                datasets.load_dataset(data.name, data.config, split=split, revision=data.revision)
                for split in (data.calibration_split, data.test_split)
            )
        else:
            suffix = "/**" if data.format == "imagefolder" else ""
            files = {
                "calibration": f"{_existing(data.calibration)}{suffix}",
                "test": f"{_existing(data.test)}{suffix}",
            }
            # Paragraphs of a text file, with the line breaks inside them, are its rows.
            options = {"sample_by": "paragraph"} if data.format == "text" else {}
            tables = datasets.load_dataset(data.format, data_files=files, **options)
            calibration, test = tables["calibration"], tables["test"]
    except RecipeError:
        raise
    # The hub's and every file format's errors are of many kinds, without a common base.
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines() or ["no message"]
        raise RecipeError(f"cannot load {data.describe()}: {cause[0]}") from error
    labels = (data.label_column,) if labelled else ()
    for table, columns in (
        (calibration, data.input_columns),
        (test, (*data.input_columns, *labels)),
    ):
        for column in columns:
            if column not in table.column_names:
                raise RecipeError(
                    f"{data.describe()} has no column {column!r}; closest: "
                    f"{closest(column, table.column_names)}"
                )
    return calibration, test


def to_batches(
    table: datasets.Dataset, prepare: Preprocessor, size: int, *, label: str | None = None
) -> tuple[list[Batch], Tensor]:
    """Prepare a whole table.

    Args:
        table: From `load_splits`.
        prepare: From `preprocessor`.
        size: Samples a batch.
        label: The label column, where labels are wanted.

    Returns:
        Batches of keyword arguments, and the classes as int64 (empty without `label`).

    Raises:
        RecipeError: If a label is no class of the model, or a row cannot be prepared.
    """
    labels = torch.zeros(0, dtype=torch.int64) if label is None else prepare.classes(table, label)
    decoded = prepare.decode(table)
    batches: list[Batch] = []
    for start in range(0, len(table), size):
        rows = slice(start, start + size)
        batches.append(_prepared(decoded, rows, prepare))
    return batches, labels


def _prepared(table: datasets.Dataset, rows: slice, prepare: Preprocessor) -> Batch:
    try:
        # Images are decoded when their rows are read.
        return prepare(table[rows])
    except (TypeError, ValueError, OSError, AttributeError) as error:
        last = min(rows.stop, len(table)) - 1
        raise RecipeError(
            f"cannot prepare rows {rows.start} to {last} of column {', '.join(prepare.columns)}: "
            f"{error}"
        ) from error


def from_pretrained(loader: Any, what: str, section: TransformersModel) -> Any:  # noqa: ANN401
    """Load what belongs to a model, as its tokenizer, and run no code of its own.

    Raises:
        RecipeError: If there is none.
    """
    try:
        return loader.from_pretrained(
            section.name, revision=section.revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"cannot load the {what} of {section.name!r}: {str(error).strip().splitlines()[0]}"
        ) from error


def _existing(path: Path) -> Path:
    if not path.exists():
        raise RecipeError(f"there is no file or folder {str(path)!r} (from {path.absolute()})")
    return path


def _draw(table: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    if count == len(table):
        return table
    return table.shuffle(seed=seed).select(range(count))
