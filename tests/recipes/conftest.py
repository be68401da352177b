"""Tiny trained-looking models and data files on disk, as users have them."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.convnext import ConvNextImageProcessorPil

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "good", "bad", "film", "a", "the", "was", "very", "it"]


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps what `datasets` caches in the test's own folder, and its bars out of the output."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def bert_folder(bert: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    model = copy.deepcopy(bert)
    model.config.label2id = {"Bad": 0, "Good": 1, "Mixed": 2}
    model.config.id2label = {0: "Bad", 1: "Good", 2: "Mixed"}
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def resnet_folder(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    resnet.save_pretrained(folder)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,000 characters of sentences, a few to a line."""
    file = tmp_path_factory.mktemp("prose") / "prose.txt"
    subjects, verdicts = ("a film", "the story", "it"), ("was very good", "was bad", "is a film")
    lines = [
        f"{index}. {subjects[index % 3]} {verdicts[index * index % 3]}. Was {subjects[-index % 3]}?"
        for index in range(60)
    ]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="session")
def llama_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with random weights, its head tied to its table, and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text_file.read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def csv_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 sentences with the names of their classes, sorted by class."""
    file = tmp_path_factory.mktemp("texts") / "texts.csv"
    rows = [("a very good film", "good")] * 12 + [("it was bad", "bad")] * 12
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    return file


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in each of two class folders."""
    home = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (home / name).mkdir()
        for index in range(10):
            pixels = generator.integers(0, 255, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / name / f"{index}.png")
    return home
