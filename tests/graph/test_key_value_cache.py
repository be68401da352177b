from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxmpq.errors import TraceError
from fxmpq.graph.key_value_cache import without_cache
from fxmpq.graph.trace import trace

IDS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_decoders_are_traced_as_they_come(make: type[nn.Module]) -> None:
    model = make()
    assert model.config.use_cache
    graph = trace(model, {"input_ids": IDS})
    assert model.config.use_cache
    for ids in (IDS, IDS[:1, :4]):
        with torch.no_grad():
            expected, found = model(input_ids=ids), graph(input_ids=ids)
        assert type(found) is type(expected)
        assert torch.allclose(found.logits, expected.logits, atol=1e-5)
        assert found.past_key_values is None


def test_settings_come_back_where_the_work_fails() -> None:
    model = llama()
    with without_cache(model):
        assert model.config.use_cache is model.model.config.use_cache is False
    with pytest.raises(ZeroDivisionError), without_cache(model):
        _ = 1 // 0
    assert model.config.use_cache is True


def test_settings_that_are_no_switch_are_left_alone() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"use_cache": True}
            self.inner = nn.Linear(2, 2)
            self.inner.config = GPT2Config(use_cache=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = Reader()
    with without_cache(model):
        assert model.config == {"use_cache": True}
        assert model.inner.config.use_cache is False
    assert model.inner.config.use_cache is False


def test_a_cache_that_the_batch_asks_for_is_still_an_error() -> None:
    with pytest.raises(TraceError, match="DynamicCache"):
        trace(llama(), {"input_ids": IDS, "use_cache": True})
