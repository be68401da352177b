from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.text import perplexity
from transformers import AutoTokenizer

from fxmpq.errors import FxmpqError
from fxmpq.recipes.loading import Loaded, load
from fxmpq.recipes.schema import RecipeError, read_recipe
from fxmpq.recipes.token_sequences import SEPARATOR, cut_texts, language_loss, to_batches


@pytest.fixture
def load_texts(llama_folder: Path, text_file: Path) -> Callable[..., Loaded]:
    """Loads a recipe of the decoder and the text file, with changes to its data."""

    def make(method: str = "projected", seed: int = 0, **data: Any) -> Loaded:
        content = {
            "budget": "avg_weight_bits=4",
            "method": method,
            "seed": seed,
            "model": {
                "source": "transformers",
                "name": str(llama_folder),
                "task": "language-modelling",
            },
            "data": {
                "source": "files",
                "format": "text",
                "calibration": text_file,
                "test": text_file,
                "input_columns": ["text"],
                "max_length": 8,
                "calibration_samples": 5,
                "test_samples": 6,
                "batch_size": 4,
                **data,
            },
        }
        return load(read_recipe(content))

    return make


def test_a_text_file_becomes_sequences_of_tokens(
    load_texts: Callable[..., Loaded], llama_folder: Path, text_file: Path
) -> None:
    loaded = load_texts()
    assert [tuple(batch["input_ids"].shape) for batch in loaded.calibration] == [(4, 8), (1, 8)]
    assert [set(batch) for batch in loaded.test] == [{"input_ids"}, {"input_ids"}]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in loaded.test]), loaded.labels)
    assert loaded.metric == "perplexity"
    assert len(loaded.calibration_labels) == 0
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    whole = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"]
    possible = {tuple(whole[start : start + 8]) for start in range(0, len(whole) - 7, 8)}
    assert {tuple(row) for row in loaded.labels.tolist()} <= possible
    assert "LlamaForCausalLM" in loaded.model_text
    with torch.no_grad():
        assert loaded.model(**loaded.test[0]).logits.shape == (4, 8, len(tokenizer))


def test_paragraphs_of_a_file_are_joined_again(
    load_texts: Callable[..., Loaded], llama_folder: Path, tmp_path: Path
) -> None:
    paragraphs = ["a film was bad\nthe story was very good", "it is a film", "the story"]
    file = tmp_path / "paragraphs.txt"
    file.write_text(SEPARATOR.join(paragraphs * 20))
    found = load_texts(test=file, test_samples=None).labels
    text = AutoTokenizer.from_pretrained(llama_folder).decode(found.flatten())
    assert file.read_text().startswith(text)
    assert len(text) > 0.9 * file.stat().st_size


def test_the_seed_draws_the_sequences(load_texts: Callable[..., Loaded]) -> None:
    first, again, longer = load_texts(), load_texts(), load_texts(test_samples=None)
    assert torch.equal(first.labels, again.labels)
    rows = longer.labels.tolist()
    assert len(first.labels) == 6 < len(rows)
    assert all(row in rows for row in first.labels.tolist())
    assert first.labels.tolist() != rows[:6]
    assert not torch.equal(load_texts(seed=1).labels, first.labels)


def test_rows_are_joined_with_a_blank_line(llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    found = cut_texts(tokenizer, ["a film", "was bad", "it"], 3)
    text = tokenizer.decode(found.flatten())
    assert f"a film{SEPARATOR}was bad{SEPARATOR}it".startswith(text)
    assert found.shape == (len(found), 3)


def test_no_more_text_is_read_than_needed(llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    read: list[int] = []

    def texts() -> Any:
        for index in range(100):
            read.append(index)
            yield "a very good film"

    assert len(cut_texts(tokenizer, texts(), 4, limit=3)) == 3
    assert len(read) < 20
    assert cut_texts(tokenizer, [], 4).shape == (0, 4)


def test_methods_with_labels_get_the_next_tokens(load_texts: Callable[..., Loaded]) -> None:
    loaded = load_texts(method="finetune")
    calibration = torch.cat([batch["input_ids"] for batch in loaded.calibration])
    assert torch.equal(loaded.calibration_labels, calibration)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"max_length": 64}, "max_length is 64, but the model reads at most 16 tokens"),
        ({"max_length": 1}, "at least 2 tokens"),
        ({"input_columns": ["text", "more"]}, "one input column"),
        ({"input_columns": ["words"]}, "no column 'words'; closest: 'text'"),
        ({"calibration_samples": 5000}, "5000 calibration sequences of 8 tokens; .* has "),
    ],
)
def test_what_does_not_fit_is_explained(
    load_texts: Callable[..., Loaded], data: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        load_texts(**data)


def test_too_little_test_text_and_other_columns_are_explained(
    load_texts: Callable[..., Loaded], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("it")
    with pytest.raises(RecipeError, match="do not fill one sequence of 8 tokens"):
        load_texts(test=short)
    numbers = tmp_path / "numbers.json"
    numbers.write_text("\n".join(json.dumps({"text": index}) for index in range(3)))
    with pytest.raises(RecipeError, match="column 'text' holds int"):
        load_texts(format="json", calibration=numbers, test=numbers)


class Fixed(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.logits}


def test_the_loss_is_the_logarithm_of_the_perplexity() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
    (batch,) = to_batches(ids, 2)
    found = language_loss(Fixed(logits), (batch, ids))
    expected = perplexity(logits[:, :-1], ids[:, 1:])
    assert float(found) == pytest.approx(math.log(float(expected)), rel=1e-5)


def test_a_loss_of_something_else_is_refused() -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(FxmpqError, match=r"takes batches \(keyword arguments, token ids\)"):
        language_loss(Fixed(torch.zeros(1, 3, 4)), ids)
    with pytest.raises(FxmpqError, match="no logits"):
        language_loss(Fixed(torch.zeros(1, 3)), ({"input_ids": ids}, ids))
