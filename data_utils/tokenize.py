"""From a pair of texts to a pair of token ids, with one prompt for both sides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_utils.schema import DataError, Message, PreferencePair, RowError, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairTokenizer:
    """Tokenizes pairs for one model: messages by its chat template, strings as BOS + prompt + response + EOS.

    The prompt ends where the ids of prompt, prompt + chosen and prompt + rejected part, so it is the same on both
    sides even where the tokenizer merges across the boundary. It is never truncated; each response keeps its first
    `max_length - len(prompt_ids)` ids. A string that spells a control token, such as "</s>", never becomes one.

    Args:
        tokenizer: a tokenizer with an EOS token, and with a chat template if the rows are messages. Copied, so
            that several threads may use this object.
        max_length: tokens of prompt + response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        eos_id, unk_id = tokenizer.eos_token_id, tokenizer.unk_token_id
        if eos_id is None:
            raise DataError("the tokenizer has no EOS token, so no response could end; set its eos_token")
        # One copy per way of encoding: changing the way changes the tokenizer, under the feet of other threads.
        self._tokenizer, self._text_tokenizer = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
        self._max_length = max_length
        assert isinstance(eos_id, int) and not isinstance(unk_id, str | list)
        self._eos_id = eos_id
        controls = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._control_texts = tuple(controls)
        self._control_ids = frozenset([*tokenizer.all_special_ids, *controls.values()])
        # The unknown token is the one control token that text may give.
        self._never_in_text = self._control_ids - {unk_id}
        self._prefix_ids = self._ids_before_text()

    def __call__(self, pair: PreferencePair, index: int) -> TokenizedPair:
        """Tokenize one pair.

        Args:
            index: the pair's global row number, carried along.

        Raises:
            RowError: cause `empty_prompt`, `empty_response`, `identical`, `prompt_too_long`, `special_token_in_text`
                or `template`.
            DataError: the pair is messages and the tokenizer has no chat template.
        """
        as_strings = isinstance(pair.prompt, str)
        prompt, chosen, rejected = self._encode_strings(pair) if as_strings else self._encode_messages(pair)
        shared = _common_prefix_length(prompt, chosen, rejected)
        if not shared:
            raise RowError(pair.where, "empty_prompt", "no token before the response to predict it from; add a prompt")
        room = self._max_length - shared
        if room < 1:
            limit = f"{shared} tokens of prompt leave no room for a response within max_length {self._max_length}"
            raise RowError(pair.where, "prompt_too_long", f"{limit}; raise it or drop the row")
        chosen_ids, rejected_ids = chosen[shared:][:room], rejected[shared:][:room]
        if not chosen_ids or not rejected_ids:
            raise RowError(pair.where, "empty_response", "the chat template adds nothing for the response; check it")
        if chosen_ids == rejected_ids:
            message = f"chosen equals rejected in its first {len(chosen_ids)} tokens, all that max_length leaves"
            raise RowError(pair.where, "identical", f"{message}; raise it or drop the row")
        return TokenizedPair(prompt[:shared], chosen_ids, rejected_ids, pair.columns, pair.where, index)

    def many(self, pairs: Sequence[PreferencePair], indices: Sequence[int]) -> list[TokenizedPair | RowError]:
        """Tokenize many pairs, each as `__call__` does; a pair that cannot be used gives its RowError."""
        results: list[TokenizedPair | RowError] = []
        for pair, index in zip(pairs, indices, strict=True):
            try:
                results.append(self(pair, index))
            except RowError as error:
                results.append(error)
        return results

    def _encode_strings(self, pair: PreferencePair) -> tuple[list[int], list[int], list[int]]:
        """Ids of prompt, prompt + chosen + EOS and prompt + rejected + EOS."""
        assert isinstance(pair.prompt, str) and isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
        for response in (pair.chosen, pair.rejected):
            if not response.replace(str(self._tokenizer.eos_token), "").strip():
                raise RowError(pair.where, "empty_response", "a response holds nothing but EOS; drop or fix the row")
        prompt, chosen, rejected = self._encode(
            [pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected], as_text=True
        )
        if not self._never_in_text.isdisjoint(chosen + rejected):
            raise RowError(pair.where, "special_token_in_text", "a control token's name is in the text; drop the row")
        before, after = self._prefix_ids, [self._eos_id]
        return before + prompt, before + chosen + after, before + rejected + after

    def _encode_messages(self, pair: PreferencePair) -> tuple[list[int], list[int], list[int]]:
        """Ids of the rendered prompt and of the two rendered conversations, each up to its end-of-turn token."""
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{pair.where}: the row is messages, but the tokenizer has no chat template; "
                "give it one or use rows of plain strings"
            )
        for message in prompt + chosen + rejected:
            self._refuse_controls(message["content"], pair.where)
        rendered = [
            self._render(prompt, pair.where, add_generation_prompt=True),
            self._render(prompt + chosen, pair.where),
            self._render(prompt + rejected, pair.where),
        ]
        prompt_ids, chosen_ids, rejected_ids = self._encode(rendered, as_text=False)
        return prompt_ids, self._end(chosen_ids), self._end(rejected_ids)

    def _render(self, messages: list[Message], where: str, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise RowError(where, "template", f"the chat template refuses the messages ({reason})") from error
        assert isinstance(text, str)
        return text

    def _refuse_controls(self, content: str, where: str) -> None:
        for text in self._control_texts:
            if text in content:
                message = f"a message holds {text!r}, which the chat template would turn into a control token"
                raise RowError(where, "special_token_in_text", f"{message}; drop or change the row")

    def _end(self, ids: list[int]) -> list[int]:
        """End in the template's own last control token, without the white space after it; in EOS if it has none."""
        last = len(ids)
        while last and ids[last - 1] not in self._control_ids and self._is_blank(ids[last - 1]):
            last -= 1
        return ids[:last] if last and ids[last - 1] in self._control_ids else [*ids, self._eos_id]

    def _is_blank(self, id: int) -> bool:
        return not str(self._tokenizer.decode([id])).strip()

    def _encode(self, texts: list[str], as_text: bool) -> list[list[int]]:
        """Ids of each text, nothing added; `as_text`: names of control tokens are spelled out like any other text."""
        tokenizer = self._text_tokenizer if as_text else self._tokenizer
        return tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=as_text,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _ids_before_text(self) -> list[int]:
        """What the tokenizer itself puts before a text: BOS, or nothing."""
        with_specials: list[int] = self._tokenizer("a")["input_ids"]
        (plain,) = self._encode(["a"], as_text=False)
        starts = range(len(with_specials) - len(plain) + 1)
        return next(with_specials[:start] for start in starts if with_specials[start:][: len(plain)] == plain)


def _common_prefix_length(prompt: list[int], chosen: list[int], rejected: list[int]) -> int:
    ids = zip(prompt, chosen, rejected, strict=False)
    shortest = min(len(prompt), len(chosen), len(rejected))
    return next((place for place, (a, b, c) in enumerate(ids) if not a == b == c), shortest)
