"""Texts for language models: joined, made into tokens and cut to sequences of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets  # type: ignore[import-untyped]  # it ships no types
import torch
import transformers
from torch import Tensor, nn

from fxmpq.errors import FxmpqError
from fxmpq.graph.batches import Batch
from fxmpq.graph.run import float_outputs
from fxmpq.recipes.schema import FilesData, HubData, RecipeError, TransformersModel
from fxmpq.recipes.table_data import from_pretrained, load_tables

SEPARATOR = "\n\n"
"""Between two texts."""

_POOL = 16
_ROWS = 256


def load_sequences(
    section: TransformersModel, model: nn.Module, data: HubData | FilesData, seed: int
) -> tuple[Tensor, Tensor]:
    """Load calibration and test texts as sequences of tokens.

    The rows of a table are joined with a blank line between them, without special tokens, and cut
    to sequences of `data.max_length` tokens; what is left over is dropped. Of more sequences than
    are asked for, those used are drawn at random from the first 16 times as many, so that of a
    large table only its beginning is read.

    Args:
        section: The model's part of the recipe, whose tokenizer is loaded.
        model: The model.
        data: The data's part of the recipe; samples are sequences.
        seed: Seeds the drawing.

    Returns:
        Token ids for calibration and test, int64 `[sequences, length]`.

    Raises:
        RecipeError: If the model reads no sequences so long, there is no tokenizer, or data,
            column or enough text are not there.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and data.max_length > longest:
        raise RecipeError(
            f"data.max_length is {data.max_length}, but the model reads at most {longest} tokens"
        )
    if data.max_length < 2 or len(data.input_columns) != 1:
        raise RecipeError(
            "a language model takes one input column and sequences of at least 2 tokens; "
            f"data.input_columns names {', '.join(data.input_columns)}, data.max_length is "
            f"{data.max_length}"
        )
    tokenizer = from_pretrained(transformers.AutoTokenizer, "tokenizer", section)
    calibration, test = load_tables(data, labelled=False)
    (column,) = data.input_columns
    found = cut_texts(
        tokenizer, texts(calibration, column), data.max_length, _POOL * data.calibration_samples
    )
    if len(found) < data.calibration_samples:
        raise RecipeError(
            f"asked for {data.calibration_samples} calibration sequences of {data.max_length} "
            f"tokens; {data.describe()} has {len(found)}"
        )
    limit = None if data.test_samples is None else _POOL * data.test_samples
    tested = cut_texts(tokenizer, texts(test, column), data.max_length, limit)
    if not len(tested):
        raise RecipeError(
            f"the test texts of {data.describe()} do not fill one sequence of {data.max_length} "
            "tokens; make data.max_length smaller"
        )
    return _draw(found, data.calibration_samples, seed), _draw(tested, data.test_samples, seed)


def texts(table: datasets.Dataset, column: str) -> Iterator[str]:
    """The texts of a table's column, some rows at a time.

    Raises:
        RecipeError: If a row holds something else.
    """
    for start in range(0, len(table), _ROWS):
        for text in table[start : start + _ROWS][column]:
            if not isinstance(text, str):
                raise RecipeError(
                    f"column {column!r} holds {type(text).__name__} where a language model takes "
                    "text"
                )
            yield text


def cut_texts(
    tokenizer: Any,  # noqa: ANN401  (transformers types none of its tokenizers)
    found: Iterable[str],
    length: int,
    limit: int | None = None,
) -> Tensor:
    """Join texts with a blank line between them and cut their tokens to sequences.

    Args:
        tokenizer: As `transformers.AutoTokenizer` loads it.
        found: Texts in order.
        length: Tokens of a sequence.
        limit: No more sequences than these, and no more text read than they need.

    Returns:
        Token ids, int64 `[sequences, length]`.
    """
    ids: list[int] = []
    for index, text in enumerate(found):
        joined = text if index == 0 else SEPARATOR + text
        ids += tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit * length:
            break
    count = len(ids) // length if limit is None else min(len(ids) // length, limit)
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def to_batches(ids: Tensor, size: int) -> list[Batch]:
    """Sequences as batches of the model's keyword arguments."""
    return [{"input_ids": part} for part in torch.split(ids, size)]


def language_loss(model: nn.Module, batch: object) -> Tensor:
    """Mean of `-log p(next token)` over a batch `(inputs, token ids)`.

    Args:
        model: Takes `inputs`, a mapping of keyword arguments, and returns logits
            `[samples, length, vocabulary]` first.
        batch: The inputs, and token ids `[samples, length]`.

    Returns:
        The mean over the tokens that have one before them, in nats.

    Raises:
        FxmpqError: If the batch is no such pair, or the model returns no logits.

    Examples:
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids):
        ...         return torch.zeros(*input_ids.shape, 8)
        >>> ids = torch.tensor([[5, 1, 2]])
        >>> round(float(language_loss(Uniform(), ({"input_ids": ids}, ids)).exp()), 4)
        8.0
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], Mapping):
        raise FxmpqError(
            "language_loss takes batches (keyword arguments, token ids); found "
            f"{type(batch).__name__}"
        )
    inputs, labels = batch
    found = float_outputs(model(**inputs))
    if not found or found[0].dim() != 3:
        raise FxmpqError("the model's first output is no logits [samples, length, vocabulary]")
    return nn.functional.cross_entropy(found[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _draw(ids: Tensor, count: int | None, seed: int) -> Tensor:
    if count is None or count >= len(ids):
        return ids
    generator = torch.Generator().manual_seed(seed)
    return ids[torch.randperm(len(ids), generator=generator)[:count].sort().values]
