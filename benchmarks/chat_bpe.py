"""A byte-level BPE of the pairs' own text with a chat template: what a benchmark tokenizes real pairs with, offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from data_utils.schema import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)
"""The line break comes before a turn, not after it, so that a response ends in its own control token and trainers that
keep what follows it train on the same ids as those that do not."""


def train_bpe(pairs: Sequence[PreferencePair], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the pairs' own text, with ChatML and EOS <|im_end|> (id 1); equal for equal pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_said_in(pairs), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHATML
    return tokenizer


def _said_in(pairs: Iterable[PreferencePair]) -> Iterable[str]:
    for pair in pairs:
        for part in (pair.prompt, pair.chosen, pair.rejected):
            yield from [part] if isinstance(part, str) else [turn["content"] for turn in part if turn.get("content")]
