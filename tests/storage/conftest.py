"""Graphs of small models and their batches, and saved folders to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from fxmpq.graph.state import state_of
from fxmpq.graph.trace import trace
from fxmpq.storage.save import FILE, save

Traced = tuple[fx.GraphModule, list[dict[str, Tensor]]]


def _images(*sizes: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    return [{"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)} for size in sizes]


def _tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    shapes = [(3, 8), (5, 6)]
    return [{"input_ids": torch.randint(0, 40, shape, generator=generator)} for shape in shapes]


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40,
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
    )


def _swin() -> nn.Module:
    return SwinForImageClassification(
        SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=4
        )
    )


def _mobilenet() -> nn.Module:
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.1, min_depth=4, num_labels=3)
    return MobileNetV2ForImageClassification(config)


_MODELS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Tensor]]]] = {
    "gpt2": (_gpt2, _tokens()),
    "vit": (_vit, _images(3, 5)),
    "swin": (_swin, _images(3, 5)),
    "mobilenet_v2": (_mobilenet, _images(3, 5)),
}


@pytest.fixture(scope="session")
def traced_models() -> dict[str, Traced]:
    """Four models of transformers, each with a traced graph and two batches that differ in size."""
    found = {}
    for name, (build, batches) in _MODELS.items():
        torch.manual_seed(7)
        found[name] = (trace(build().eval(), batches[0]), batches)
    return found


@pytest.fixture(scope="session")
def planned(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Callable[..., fx.GraphModule]
) -> fx.GraphModule:
    """A small convolutional net at mixed precision, its activations quantized too."""
    from fxmpq.graph.switch import with_choices

    graph = calibrated(conv_graph, images, "onnxruntime")
    groups = state_of(graph).groups
    chosen = {g.name: str(g.candidates[i % len(g.candidates)]) for i, g in enumerate(groups)}
    return with_choices(graph, chosen)


class Saved:
    """A folder with a saved graph, whose JSON a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict:
        return json.loads((self.folder / FILE).read_text())

    def write(self, content: object) -> Path:
        (self.folder / FILE).write_text(json.dumps(content))
        return self.folder


@pytest.fixture
def saved(planned: fx.GraphModule, tmp_path: Path) -> Saved:
    return Saved(save(planned, tmp_path / "graph"))
