"""Building small models with random weights of transformers architectures, with inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

Inputs = dict[str, Tensor]

SIZES: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_DECODER: Mapping[str, Any] = {**SIZES, "num_key_value_heads": 2, "use_cache": False}
_VISION: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
_SETTLING_SAMPLES = 16
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Architecture:
    """A small model of one architecture.

    Args:
        config: Options of its configuration.
        inputs: Makes a batch of so many samples from a generator.
        head: The auto class that builds it.
    """

    config: Mapping[str, Any]
    inputs: Callable[[int, torch.Generator], Inputs]
    head: Any = AutoModel
    more: Mapping[str, Any] = field(default_factory=dict)

    def build(self, name: str) -> nn.Module:
        """The model, in eval mode, the same weights every time."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**self.config, **self.more})
        model = self.head.from_config(config).eval()
        _settle_batch_norms(model, self.inputs(_SETTLING_SAMPLES, torch.Generator().manual_seed(0)))
        return model


def _settle_batch_norms(model: nn.Module, batch: Inputs) -> None:
    """Give batch norms the statistics of a batch, without which random weights let signals die."""
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model(**batch)
    for norm in norms:
        norm.eval()


def tokens(samples: int, generator: torch.Generator) -> Inputs:
    ids = torch.randint(3, 120, (samples, 16), generator=generator)
    return {"input_ids": ids}


def masked_tokens(samples: int, generator: torch.Generator) -> Inputs:
    found = tokens(samples, generator)
    return {**found, "attention_mask": torch.ones_like(found["input_ids"])}


def _pair(samples: int, generator: torch.Generator) -> Inputs:
    found = tokens(samples, generator)
    return {**found, "decoder_input_ids": torch.randint(3, 120, (samples, 8), generator=generator)}


def _images(size: int) -> Callable[[int, torch.Generator], Inputs]:
    def make(samples: int, generator: torch.Generator) -> Inputs:
        return {"pixel_values": torch.randn(samples, 3, size, size, generator=generator)}

    return make


def _audio(samples: int, generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(samples, 800, generator=generator)}


def _video(samples: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(samples, 4, 3, 32, 32, generator=generator)}


def _spectrograms(samples: int, generator: torch.Generator) -> Inputs:
    return {"input_values": torch.randn(samples, 32, 16, generator=generator)}


def text(**more: Any) -> Architecture:
    """An encoder of token ids with a mask."""
    return Architecture(SIZES, masked_tokens, AutoModel, more)


def decoder(**more: Any) -> Architecture:
    """A causal language model."""
    return Architecture(_DECODER, tokens, AutoModelForCausalLM, more)


def seq2seq(**more: Any) -> Architecture:
    """An encoder and a decoder."""
    return Architecture({**_DECODER}, _pair, AutoModel, more)


def vision(size: int = 32, **more: Any) -> Architecture:
    """A patch transformer on images."""
    return Architecture({**_VISION, "image_size": size}, _images(size), AutoModel, more)


def conv(size: int = 64, **more: Any) -> Architecture:
    """A convolutional network on images, with only the options given."""
    return Architecture({}, _images(size), AutoModel, more)


def audio(**more: Any) -> Architecture:
    """An encoder of raw waveforms."""
    return Architecture(SIZES, _audio, AutoModel, more)


def video(**more: Any) -> Architecture:
    """A patch transformer on clips of four images."""
    return Architecture({**_VISION, "num_frames": 4}, _video, AutoModel, more)


def spectrogram(**more: Any) -> Architecture:
    """A patch transformer on spectrograms."""
    return Architecture(_VISION, _spectrograms, AutoModel, more)
