"""A transformers model, called with keywords and fed with mappings that hold labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import fxmpq
from fxmpq.callbacks import MixedPrecisionCallback
from fxmpq.errors import PrecisionError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated",  # Lightning 2.6 and torch 2.13
    "ignore:The '.*_dataloader' does not have many workers",
)
CALLS: dict[str, Callable[[Any, dict[str, Tensor]], SequenceClassifierOutput]] = {
    "all keywords": lambda model, batch: model(**batch),
    "no labels": lambda model, batch: model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ),
    "both kinds": lambda model, batch: model(
        batch["input_ids"], batch["attention_mask"], labels=batch["labels"]
    ),
}


class Texts(LightningModule):
    """Classifies sequences with BERT."""

    def __init__(self, call: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
            num_labels=3,
            initializer_range=0.3,
        )
        self.bert = BertForSequenceClassification(config)
        self.call = CALLS[call]
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.mean_loss = MeanMetric()
        self.logits: list[Tensor] = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self.call(self.bert, batch)
        assert isinstance(output, SequenceClassifierOutput)
        self.logits.append(output.logits)
        self.accuracy(output.logits, batch["labels"])
        self.log("accuracy", self.accuracy)
        if output.loss is not None:
            self.mean_loss(output.loss, len(output.logits))
            self.log("loss", self.mean_loss)


def texts(count: int = 48) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 13, (count,), generator=generator)
    return [
        {
            "input_ids": torch.randint(1, 64, (12,), generator=generator),
            "attention_mask": (torch.arange(12) < length).long(),
            "labels": torch.randint(3, (), generator=generator),
        }
        for length in lengths
    ]


@pytest.mark.parametrize("call", CALLS)
def test_bert_is_quantized_however_the_step_calls_it(
    make_trainer: Callable[..., Trainer], call: str
) -> None:
    module, loader = Texts(call), DataLoader(texts(), batch_size=16)
    callback = MixedPrecisionCallback(
        "reference",
        "weights=16%",
        candidates=["w2a8", "w4a8", "w8a8"],
        module="bert",
        calibration=loader,
    )
    (found,) = make_trainer(callbacks=[callback]).validate(module, loader, verbose=False)
    assert module.bert is callback.graph_module
    with torch.no_grad():
        by_hand = [module.call(callback.graph_module, batch) for batch in loader]
        in_float = [module.call(callback.float_module, batch) for batch in loader]
    logits = torch.cat([output.logits for output in by_hand])
    assert torch.equal(torch.cat(module.logits), logits)
    assert not torch.equal(torch.cat([output.logits for output in in_float]), logits)
    labels = torch.stack([text["labels"] for text in texts()])
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    if call != "no labels":
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert "bert.encoder.layer.0.attention.self.query" in callback.plan.layers
    assert fxmpq.convert(callback.graph_module).sqnr_db > 25


def test_bert_converts_for_onnxruntime(make_trainer: Callable[..., Trainer]) -> None:
    module, loader = Texts("no labels"), DataLoader(texts(), batch_size=16)
    callback = MixedPrecisionCallback(budget="weights=40%", module="bert", calibration=loader)
    make_trainer(callbacks=[callback]).validate(module, loader, verbose=False)
    converted = fxmpq.convert(callback.graph_module)
    assert converted.sqnr_db > 25
    batch = next(iter(DataLoader(texts(), batch_size=5)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert converted.run(inputs)[0].shape == (5, 3)


def test_products_of_attention_are_quantized_where_asked(
    make_trainer: Callable[..., Trainer],
) -> None:
    settings = {"candidates": ["w8a8", "a8"], "module": "bert"}
    with pytest.raises(PrecisionError, match="a8 is of products"):
        MixedPrecisionCallback("reference", "weights=40%", **settings)
    module, loader = Texts("no labels"), DataLoader(texts(), batch_size=16)
    callback = MixedPrecisionCallback(
        "reference", "weights=40%", calibration=loader, products=True, **settings
    )
    make_trainer(callbacks=[callback]).validate(module, loader, verbose=False)
    assert callback.plan.layers["bert.encoder.layer.0.attention.self.scores"] == "a8"
    assert fxmpq.convert(callback.graph_module).sqnr_db == float("inf")
