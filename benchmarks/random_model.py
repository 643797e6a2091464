"""Random Llamas with a tokenizer, and preference pairs of known lengths: what a benchmark needs without any download.

One word is one token (`w17` is token 17), so that lengths in words are lengths in tokens and the whole vocabulary is
used, as embedding and head see it in real training.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

UNKNOWN, EOS = "w0", "</s>"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes; the embeddings are tied."""

    vocabulary: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    initializer_range: float
    max_positions: int = 2048

    @property
    def body_parameters(self) -> int:
        """Weights of all linear layers but the head, per token each one multiplication."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    def lora_parameters(self, rank: int) -> int:
        """Weights of adapters of this rank on all linear layers but the head."""
        kv = self.hidden // self.heads * self.kv_heads
        sums = 2 * (self.hidden + self.hidden) + 2 * (self.hidden + kv) + 3 * (self.hidden + self.ffn)
        return self.layers * rank * sums


TINY = Shape(512, hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, initializer_range=0.2)
"""For the CPU; logits far from uniform, so that errors show."""
SMALL = Shape(4096, hidden=512, ffn=1408, layers=4, heads=8, kv_heads=4, initializer_range=0.05)
"""For equivalence on a GPU: heads of 64, grouped; logits far from uniform."""
ONE_B = Shape(128_256, hidden=2048, ffn=8192, layers=16, heads=32, kv_heads=8, initializer_range=0.02)
"""The shape of Llama 3.2 1B: 1.24 billion parameters."""

EIGHT_B = Shape(128_256, hidden=4096, ffn=14_336, layers=32, heads=32, kv_heads=8, initializer_range=0.02)
"""The shape of Llama 3.1 8B, but for tied embeddings: 7.5 billion parameters."""


def write_model(folder: Path, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Path:
    """Save a random model and a tokenizer of words into `folder`."""
    write_weights(folder, shape, dtype, device, seed)
    write_word_tokenizer(folder, shape.vocabulary)
    return folder


def write_weights(folder: Path, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> None:
    """Save a random model, whose EOS is token 1, into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)


def write_word_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a tokenizer whose tokens are the words w0, w2, w3, ... and an EOS into `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {EOS if number == 1 else f"w{number}": number for number in range(vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN, eos_token=EOS).save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class PairShape:
    """Ranges (least, most) of tokens; each length is drawn evenly from its range."""

    prompt: tuple[int, int]
    response: tuple[int, int]


@dataclass(frozen=True, slots=True)
class PairSums:
    """What was written: pairs, tokens of both sequences of all pairs, the same with each prompt once, and scored tokens
    (responses with their EOS)."""

    pairs: int
    tokens: int
    shared_tokens: int
    scored: int


def write_pairs(path: Path, num_pairs: int, shape: PairShape, vocabulary: int, seed: int = 0) -> PairSums:
    """A shard of plain-string pairs of random words; the same bytes for the same arguments."""
    random = Random(seed)
    rows, prompts, scored = [], 0, 0
    for _ in range(num_pairs):
        prompt, chosen, rejected = (random.randint(*span) for span in (shape.prompt, shape.response, shape.response))
        sides = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        row = {side: " " + random_words(random, length, vocabulary) for side, length in sides.items()}
        rows.append(json.dumps(row) + "\n")
        prompts += prompt
        scored += chosen + rejected + 2
    path.write_text("".join(rows))
    return PairSums(num_pairs, 2 * prompts + scored, prompts + scored, scored)


def random_words(random: Random, length: int, vocabulary: int) -> str:
    """So many words of which each is one token, none of them special."""
    return " ".join(f"w{random.randrange(2, vocabulary)}" for _ in range(length))


def describe(shape: Shape) -> dict[str, int | float]:
    """The sizes, and the number of parameters (norms left out)."""
    return asdict(shape) | {"parameters": shape.body_parameters + shape.vocabulary * shape.hidden}
