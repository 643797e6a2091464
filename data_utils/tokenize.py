"""From pairs of texts to pairs of token ids, with one prompt for both sides."""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from data_utils.chat import ChatTemplate
from data_utils.encoding import Encoder, Offsets
from data_utils.schema import DataError, PreferencePair, RowError, Spans, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

P = ParamSpec("P")
R = TypeVar("R")


class PairTokenizer:
    """Tokenizes pairs for one model: messages by its chat template, strings as BOS + prompt + response + EOS.

    The prompt ends where the ids of prompt, prompt + chosen and prompt + rejected part, so it is the same on both
    sides even where the tokenizer merges across the boundary. It is never truncated; each response keeps its first
    `max_length - len(prompt_ids)` ids. Of a response of several turns, the assistant's are scored. A string that
    spells a control token, such as "</s>", never becomes one.

    Several threads may use one object, and it can be pickled.

    Args:
        tokenizer: a tokenizer with an EOS token, and with a chat template if the rows are messages. Copied.
        max_length: tokens of prompt + response.

    Raises:
        DataError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        eos_id, unk_id = tokenizer.eos_token_id, tokenizer.unk_token_id
        if eos_id is None:
            raise DataError("the tokenizer has no EOS token, so no response could end; set its eos_token")
        assert isinstance(eos_id, int) and not isinstance(unk_id, str | list)
        self._tokenizer = copy.deepcopy(tokenizer)
        self._max_length = max_length
        self._eos_id = eos_id
        self._control_ids = control_ids(tokenizer)
        # The unknown token is the one control token that text may give.
        self._never_in_text = self._control_ids - {unk_id}
        with_specials: list[int] = self._tokenizer("a")["input_ids"]
        self._encoder = Encoder(self._tokenizer)
        self._prefix_ids = _before(self._encoder.encode(["a"], as_text=False)["a"], with_specials)
        self._chat = ChatTemplate(self._tokenizer)
        self._blank: dict[int, bool] = {}

    def __call__(self, pair: PreferencePair, index: int) -> TokenizedPair:
        """Tokenize one pair.

        Args:
            index: the pair's global row number, carried along.

        Raises:
            RowError: cause `empty_prompt`, `empty_response`, `identical`, `prompt_too_long`, `special_token_in_text`
                or `template`.
            DataError: the pair is messages and the tokenizer has no chat template; or a response has several turns
                and the tokenizer does not tell where in the text its tokens lie.
        """
        (result,) = self.many([pair], [index])
        if isinstance(result, RowError):
            raise result
        return result

    def many(self, pairs: Sequence[PreferencePair], indices: Sequence[int]) -> list[TokenizedPair | RowError]:
        """Tokenize many pairs, each as `__call__` does but faster; a pair that cannot be used gives its RowError."""
        texts = [_attempt(self._texts, pair) for pair in pairs]
        ids: dict[bool, dict[str, list[int]]] = {}
        for as_text in (False, True):
            mine = (text for text in texts if isinstance(text, _Texts) and text.as_text == as_text)
            ids[as_text] = self._encoder.encode((part for text in mine for part in text.parts), as_text)
        return [
            text if isinstance(text, RowError) else _attempt(self._pair, pair, index, text, ids[text.as_text])
            for pair, index, text in zip(pairs, indices, texts, strict=True)
        ]

    def _texts(self, pair: PreferencePair) -> _Texts:
        if not isinstance(pair.prompt, str):
            rendered = self._chat(pair)
            turns = rendered.chosen_turns, rendered.rejected_turns
            return _Texts((rendered.prompt, rendered.chosen, rendered.rejected), as_text=False, turns=turns)
        assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
        for response in (pair.chosen, pair.rejected):
            if not response.replace(str(self._tokenizer.eos_token), "").strip():
                raise RowError(pair.where, "empty_response", "a response holds nothing but EOS; drop or fix the row")
        prompt = pair.prompt
        return _Texts((prompt, prompt + pair.chosen, prompt + pair.rejected), as_text=True, turns=(None, None))

    def _pair(self, pair: PreferencePair, index: int, texts: _Texts, ids: dict[str, list[int]]) -> TokenizedPair:
        """Put the ids together: split off the shared prompt, cut the responses to size, find what is scored."""
        prompt, chosen, rejected = (ids[part] for part in texts.parts)
        if texts.as_text:
            if not (self._never_in_text.isdisjoint(chosen) and self._never_in_text.isdisjoint(rejected)):
                message = "a control token's name is in the text; drop the row"
                raise RowError(pair.where, "special_token_in_text", message)
            before, after = self._prefix_ids, [self._eos_id]
            prompt, chosen, rejected = before + prompt, before + chosen + after, before + rejected + after
        else:
            chosen, rejected = self._end(chosen), self._end(rejected)
        shared = _common_prefix_length(prompt, chosen, rejected)
        room = self._room(shared, pair.where)
        chosen, rejected = chosen[shared:], rejected[shared:]
        if not chosen or not rejected:
            raise RowError(pair.where, "empty_response", "the chat template adds nothing for the response; check it")
        if chosen[:room] == rejected[:room]:
            num_ids = len(chosen[:room])
            message = f"chosen equals rejected in its first {num_ids} tokens, all that max_length leaves"
            raise RowError(pair.where, "identical", f"{message}; raise it or drop the row")
        scored = [
            None if turns is None else self._scored(text, turns, shared, len(response), room, pair.where)
            for text, turns, response in zip(texts.parts[1:], texts.turns, (chosen, rejected), strict=True)
        ]
        columns, where = pair.columns, pair.where
        return TokenizedPair(prompt[:shared], chosen[:room], rejected[:room], columns, where, index, *scored)

    def _room(self, num_prompt_ids: int, where: str) -> int:
        """How many tokens of a response `max_length` leaves after a prompt of so many."""
        if not num_prompt_ids:
            raise RowError(where, "empty_prompt", "no token before the response to predict it from; add a prompt")
        room = self._max_length - num_prompt_ids
        if room < 1:
            limit = f"{num_prompt_ids} tokens of prompt leave no room for a response within max_length"
            raise RowError(where, "prompt_too_long", f"{limit} {self._max_length}; raise it or drop the row")
        return room

    def _scored(self, text: str, turns: Spans, shared: int, num_ids: int, room: int, where: str) -> Spans:
        """Spans of a response's ids, cut to `room`, that hold the assistant's turns.

        Args:
            text: the conversation, and `turns` spans of its characters.
            shared: ids of the prompt.
            num_ids: ids of the whole response; the last turn reaches to its end, an EOS that we put there included.
        """
        spans = _token_spans(self._encoder.offsets(text), turns)
        spans[-1] = spans[-1][0], shared + num_ids
        kept = _clipped(spans, shared, room)
        if kept:
            return kept
        if _clipped(spans, shared, num_ids):
            message = f"max_length {self._max_length} cuts off everything that the assistant says in a response"
            raise RowError(where, "prompt_too_long", f"{message}; raise it or drop the row")
        raise RowError(where, "empty_response", "the chat template adds nothing for the response; check it")

    def _end(self, ids: list[int]) -> list[int]:
        """End in the template's own last control token, without the white space after it; in EOS if it has none."""
        last = len(ids)
        while last and ids[last - 1] not in self._control_ids and self._is_blank(ids[last - 1]):
            last -= 1
        return ids[:last] if last and ids[last - 1] in self._control_ids else [*ids, self._eos_id]

    def _is_blank(self, id: int) -> bool:
        if id not in self._blank:
            self._blank[id] = not str(self._tokenizer.decode([id])).strip()
        return self._blank[id]


@dataclass(frozen=True, slots=True)
class _Texts:
    """What has to be encoded for one pair.

    Attributes:
        parts: prompt, prompt + chosen, prompt + rejected.
        as_text: whether names of control tokens are text.
        turns: of a response of several turns, the assistant's, as characters of the last two parts.
    """

    parts: tuple[str, str, str]
    as_text: bool
    turns: tuple[Spans | None, Spans | None]


def _attempt(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | RowError:
    try:
        return function(*args, **kwargs)
    except RowError as error:
        return error


def _before(ids: list[int], with_specials: list[int]) -> list[int]:
    """What stands before `ids` in `with_specials`: BOS, or nothing."""
    starts = range(len(with_specials) - len(ids) + 1)
    return next(with_specials[:start] for start in starts if with_specials[start:][: len(ids)] == ids)


def _common_prefix_length(prompt: list[int], chosen: list[int], rejected: list[int]) -> int:
    size = len(prompt)
    if chosen[:size] == prompt == rejected[:size]:
        return size
    ids = zip(prompt, chosen, rejected, strict=False)
    shortest = min(size, len(chosen), len(rejected))
    return next((place for place, (a, b, c) in enumerate(ids) if not a == b == c), shortest)


def _token_spans(offsets: Offsets, spans: Spans) -> list[tuple[int, int]]:
    """Spans of tokens that hold any character of the spans of characters: who spans a boundary belongs to the turn."""
    starts = [start for start, _ in offsets]
    ends = [max(end, start + 1) for start, end in offsets]
    return [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]


def _clipped(spans: Sequence[tuple[int, int]], start: int, size: int) -> Spans:
    """What of the spans lies within `size` places from `start`, counted from there; none of them empty."""
    inside = ((max(first - start, 0), min(last - start, size)) for first, last in spans)
    return tuple((first, last) for first, last in inside if first < last)


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all tokens that text must not give, and in one of which a response ends."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset([*tokenizer.all_special_ids, *added])
