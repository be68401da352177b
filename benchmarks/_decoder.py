"""A small decoder that the benchmarks share: Llama-shaped, trained on Python's own sources."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch
from _models import CACHE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = CACHE / "decoder"
LENGTH = 256
"""Tokens of a sequence."""

_VOCABULARY = 2048
_STEPS = 1200
_SEQUENCES = 8
_RATE = 3e-3
_LEFT_OUT = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"})
_END = "<|end|>"


def sources() -> tuple[list[str], list[str]]:
    """The modules of Python's standard library, for training and held out.

    The library comes with every Python, under the PSF licence. Tests, character tables and
    generated texts are left out; a module in ten is held out, chosen by a hash of its path, so
    that nothing of it is trained on.
    """
    home = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for file in sorted(home.rglob("*.py")):
        place = file.relative_to(home)
        if _LEFT_OUT & set(place.parts) or "pydoc_data" in place.parts:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.blake2b(place.as_posix().encode(), digest_size=2).digest()
        (held_out if int.from_bytes(digest, "big") % 10 == 0 else train).append(text)
    return train, held_out


def decoder() -> LlamaForCausalLM:
    """The trained model, in eval mode; about ten CPU minutes the first time, then cached.

    3.7 million parameters: 4 layers of width 256, 8 heads (4 for keys and values), feed-forward
    width 768, 2,048 tokens, the head tied to the embedding. The folder `FOLDER` holds it and its
    tokenizer as `save_pretrained` writes them, and the held-out texts as JSON lines.
    """
    if not (FOLDER / "config.json").exists():
        train()
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2,048 tokens, found on the training texts."""
    if not (FOLDER / "tokenizer.json").exists():
        _find_tokenizer(sources()[0])
    found: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        FOLDER, local_files_only=True
    )
    return found


def sequences(texts: Iterable[str]) -> Tensor:
    """Token ids of the joined texts, int64 `[sequences, LENGTH]`; what is left over is dropped."""
    found = tokenizer()
    end = found.eos_token_id
    ids = [token for text in texts for token in (*found(text)["input_ids"], end)]
    count = len(ids) // LENGTH
    return torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)


def unigram_perplexity(train_ids: Tensor, held_out_ids: Tensor) -> float:
    """Perplexity of the tokens' frequencies alone, with one added to every count."""
    counts = torch.bincount(train_ids.flatten(), minlength=_VOCABULARY).double() + 1
    return math.exp(-float((counts / counts.sum()).log()[held_out_ids.flatten()].mean()))


def train() -> None:
    """Train and save: AdamW, one cycle of the learning rate, bfloat16 products."""
    texts, _ = sources()
    ids = sequences(texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=768,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, _STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(_STEPS):
        batch = ids[torch.randint(len(ids), (_SEQUENCES,), generator=generator)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch).logits
        loss = functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {_STEPS}: loss {float(loss):.3f}", flush=True)
    model.save_pretrained(FOLDER)


def _find_tokenizer(texts: Iterable[str]) -> None:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=2,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=found, eos_token=_END).save_pretrained(FOLDER)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_texts, held_out_texts = sources()
    train_ids, held_out_ids = sequences(train_texts), sequences(held_out_texts)
    print(f"{train_ids.numel():,} tokens for training, {held_out_ids.numel():,} held out")
    print(f"unigram perplexity {unigram_perplexity(train_ids, held_out_ids):.1f}")
    decoder()
