"""Tiny real tokenizers (and models), made in a moment and shared by all tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
PLAIN_CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = (
    "Once upon a time there was a little cat. The cat sat on the mat and was happy.",
    "What is the capital of France? The capital of France is Paris, of course!",
    "Please write a short poem about the sea. I am sorry, but I do not know any poems.",
)


def tiny_tokenizer(
    *, chat_template: str | None = None, adds_bos: bool = False, vocab_size: int = 400, texts: Iterable[str] = TEXTS
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with EOS `</s>`; `adds_bos`: it puts `<s>` before each text, as Llama's does."""
    backend = Tokenizer.from_str(_trained(vocab_size, tuple(texts)))
    if adds_bos:
        specials = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _trained(vocab_size: int, texts: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def tiny_model(
    folder: Path,
    *,
    tied: bool = True,
    chat_template: str | None = CHATML,
    experts: int = 0,
    hidden_size: int = 32,
) -> Path:
    """A random two-layer Llama with a tokenizer in `folder`, with logits far from uniform so that errors show; with
    `experts` a Mixtral that sends each token to two of so many."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer(chat_template=chat_template)
    routed = {"num_local_experts": experts, "num_experts_per_tok": 2, "sliding_window": None} if experts else {}
    config = AutoConfig.for_model(
        "mixtral" if experts else "llama",
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        **routed,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_pairs(path: Path, num_pairs: int, seed: int = 0, columns: bool = False) -> Path:
    """A shard of plain-string pairs of very different lengths, none like another; with `columns` every third has a
    weight and every fourth a beta of its own."""
    random = Random(seed)
    words = " ".join(TEXTS).split()

    def text(least: int, most: int) -> str:
        return " ".join(random.choice(words) for _ in range(random.randint(least, most)))

    rows: list[dict[str, str | float]] = [
        {"prompt": f"{number} {text(1, 12)}", "chosen": f" {text(1, 6)}.", "rejected": f" {text(1, 9)}!"}
        for number in range(num_pairs)
    ]
    for row in rows[::3] if columns else ():
        row["weight"] = round(random.uniform(0.2, 2), 3)
    for row in rows[::4] if columns else ():
        row["beta"] = round(random.uniform(0.05, 0.3), 3)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
