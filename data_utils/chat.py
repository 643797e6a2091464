"""From messages to one text, by the tokenizer's chat template, and where the assistant's turns lie in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_utils.bounded import Guard, OutOfBounds, try_out
from data_utils.encoding import alternatives
from data_utils.schema import DataError, Message, PreferencePair, RowError, Spans, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLAIN_KEYS = {"role", "content"}
_GUARD = Guard()


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A pair of message lists as texts.

    Attributes:
        prompt: with the header of the assistant's turn that comes next.
        chosen, rejected: the whole conversations, prompt included.
        chosen_turns, rejected_turns: half-open spans of characters of the assistant's turns in the response, each up
            to and with what ends it, white space after that left out. None: the response is a single turn.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_turns: Spans | None
    rejected_turns: Spans | None


class ChatTemplate:
    """Renders pairs exactly as `apply_chat_template` does; refuses what would not come out as it stands in the row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._is_tried = False
        controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._controls = alternatives({*controls, *tokenizer.all_special_tokens})

    def __call__(self, pair: PreferencePair) -> RenderedPair:
        """Render one pair.

        Raises:
            RowError: cause `special_token_in_text` or `template`.
            DataError: the tokenizer has no chat template.
        """
        prompt, chosen, rejected, where = pair.prompt, pair.chosen, pair.rejected, pair.where
        assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{where}: the row is messages, but the tokenizer has no chat template; "
                "give it one or use rows of plain strings"
            )
        if not self._is_tried:
            self._try_out(pair)
        self._refuse_controls(pair)
        (prompt_text,) = self._render([prompt], pair, add_generation_prompt=True)
        chosen_text, rejected_text = self._render([prompt + chosen, prompt + rejected], pair)
        for messages, text in ((prompt + chosen, chosen_text), (prompt + rejected, rejected_text)):
            _refuse_dropped_tools(messages, pair.tools, text, where)
        chosen_turns = self._turns(prompt, chosen, chosen_text, pair)
        rejected_turns = self._turns(prompt, rejected, rejected_text, pair)
        return RenderedPair(prompt_text, chosen_text, rejected_text, chosen_turns, rejected_turns)

    def _try_out(self, pair: PreferencePair) -> None:
        """Run the template in a process of its own first: it is a program of the model's.

        Raises:
            DataError: it takes too long, or too much memory.
        """
        try:
            try_out(lambda: self._apply([[{"role": "user", "content": "Hello"}]], pair, True))
            try_out(lambda: self._apply([pair.prompt + pair.chosen], pair, False))  # type: ignore[operator]
        except OutOfBounds as error:
            raise DataError(
                f"{pair.where}: the tokenizer's chat template is refused: {error} for this row; give it another one"
            ) from error
        self._is_tried = True

    def _apply(self, conversations: list[Any], pair: PreferencePair, add_generation_prompt: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            conversations,
            tools=list(pair.tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _render(
        self, conversations: list[list[Message]], pair: PreferencePair, add_generation_prompt: bool = False
    ) -> list[str]:
        try:
            with _GUARD.watching():
                texts: Any = self._apply(conversations, pair, add_generation_prompt)
        except Exception as error:  # a template is a program of the model's: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(pair.where, "template", f"the chat template refuses the messages ({reason})") from error
        return texts

    def _refuse_controls(self, pair: PreferencePair) -> None:
        if self._controls is None:
            return
        for text in _texts(pair):
            if found := self._controls.search(text):
                message = f"a message holds {found[0]!r}, which the chat template would turn into a control token"
                raise RowError(pair.where, "special_token_in_text", f"{message}; drop or change the row")

    def _turns(self, prompt: list[Message], response: list[Message], text: str, pair: PreferencePair) -> Spans | None:
        """Spans of characters of the response's assistant turns, from renderings of what comes before and with them.

        Raises:
            RowError: cause `template`: such a rendering is not how the whole begins.
        """
        if len(response) == 1:
            return None
        spans = []
        for place in (place for place, turn in enumerate(response) if turn["role"] == "assistant"):
            before, with_it = prompt + response[:place], prompt + response[: place + 1]
            # A response that begins with the assistant is scored from where the ids part, however short it is.
            header = self._render([before], pair, add_generation_prompt=True)[0] if place else ""
            end = (self._render([with_it], pair)[0] if with_it[len(prompt) :] != response else text).rstrip()
            if not (text.startswith(header) and text.startswith(end)):
                message = f"the chat template rewrites turn {len(with_it)} of the conversation once more is known"
                remedy = "so its tokens cannot be told apart; use a template that does not, or one turn per response"
                raise RowError(pair.where, "template", f"{message}, {remedy}")
            spans.append((len(header), max(len(header), len(end))))
        return tuple(spans)


def _refuse_dropped_tools(messages: list[Message], tools: tuple[Tool, ...], text: str, where: str) -> None:
    """A template that does not know tools drops them without a word; the response would then answer nothing."""
    calls: list[Any] = [call for message in messages for call in message.get("tool_calls") or ()]
    for kind, functions in (("tools", tools), ("tool calls", calls)):
        for function in functions:
            name = function.get("function", function).get("name")
            if isinstance(name, str) and name not in text:
                message = f"the chat template drops the {kind}: {name!r} is not in what it gives"
                raise RowError(where, "template", f"{message}; use a template that knows tools or drop the row")


def _texts(pair: PreferencePair) -> Iterator[str]:
    """Everything in a row of messages that a template may print."""
    for part in (pair.prompt, pair.chosen, pair.rejected):
        for message in part:
            assert isinstance(message, dict)
            yield from _strings(message.get("content") if message.keys() <= PLAIN_KEYS else message)
    yield from _strings(pair.tools)


def _strings(value: object) -> Iterator[str]:
    """All strings in nested lists and objects, their keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)
