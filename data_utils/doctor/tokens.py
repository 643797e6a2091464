"""The model's tokenizer: opening it, what its chat template does, one pair token by token."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from data_utils.doctor.report import Habit, Token, TokenRow
from data_utils.schema import DataError, Message, Spans, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1 << 40  # tokens: lengths are measured before anything is cut
MAX_SHOWN_TOKENS = 300  # of each part of the row that is shown
_CONTEXT_TOKENS = 8  # enough for a decoder to know whether a word begins
_USER: Message = {"role": "user", "content": "What is two and two?"}
_THINKING = "<think>adding</think>Four."


def open_tokenizer(model: str) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer of a folder or hub name, and how many positions its model has, where a config says so.

    Raises:
        DataError: there is none.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"--model {model}: no tokenizer and config there ({reason}); give a model folder") from error
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def template_habits(tokenizer: PreTrainedTokenizerBase) -> list[Habit]:
    """What the chat template does with a small conversation of our own: BOS, end token, earlier turns, system turns."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return [Habit("note", "no_template", "The tokenizer has no chat template: rows must be plain strings.")]
    try:
        talk = [_USER, _assistant("Four."), _USER, _assistant("Still four.")]
        whole = _render(tokenizer, talk)
        habits = [_bos(tokenizer, whole), _end(tokenizer, whole), *_rewrites(tokenizer, talk, whole)]
    except TemplateError as error:
        reason = " ".join(str(error).split())
        return [Habit("look", "refuses_conversation", f"The template refuses a plain conversation ({reason}).")]
    return [*habits, _system(tokenizer)]


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))


def _bos(tokenizer: PreTrainedTokenizerBase, rendered: str) -> Habit:
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or bos not in rendered[: 2 * len(bos)]:
        return Habit("fine", "bos", "The template writes no BOS, and none is added.")
    if rendered.startswith(bos + bos):
        return Habit("look", "double_bos", f"The template writes two BOS tokens ({bos}) at the start.")
    ids = tokenizer(rendered, verbose=False)["input_ids"]
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        what = f"The template writes BOS ({bos}) and the tokenizer adds one of its own: other trainers may see two."
        return Habit("note", "bos_twice_elsewhere", f"{what} This one takes the template's only.")
    return Habit("fine", "bos", f"The template writes one BOS ({bos}).")


def _end(tokenizer: PreTrainedTokenizerBase, rendered: str) -> Habit:
    controls = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    end = next((text for text in sorted(controls, key=len, reverse=True) if rendered.rstrip().endswith(text)), None)
    if end is None:
        what = "The template ends a response with no control token, so EOS"
        return Habit("look", "no_end", f"{what} ({tokenizer.eos_token}) is added; generation must add no less.")
    if end != tokenizer.eos_token:
        what = f"Responses end in {end}, but the tokenizer's EOS is {tokenizer.eos_token}"
        return Habit("note", "end_is_not_eos", f"{what}: have generation stop at {end}.")
    return Habit("fine", "end", f"Responses end in the tokenizer's EOS ({end}).")


def _rewrites(tokenizer: PreTrainedTokenizerBase, talk: list[Message], whole: str) -> list[Habit]:
    """Whether what was rendered for a shorter conversation is how a longer one begins."""
    habits = []
    if not whole.startswith(_render(tokenizer, talk[:2]).rstrip()):
        what = "The template writes earlier turns differently once later ones follow"
        habits.append(Habit("look", "rewrites_turns", f"{what}: what is trained is not what generation has seen."))
    thinking = [talk[0], _assistant(_THINKING)]
    if _THINKING not in _render(tokenizer, [*thinking, *talk[2:]]):
        what = "The template drops <think> parts of earlier turns, as reasoning models do"
        habits.append(Habit("note", "drops_thinking", f"{what}; they count as prompt without them."))
    if not _render(tokenizer, talk[:2]).startswith(_render(tokenizer, talk[:1], generate=True)):
        what = "The generation prompt is not how the template begins a response"
        habits.append(Habit("note", "generation_prompt", f"{what}: what they do not share counts as response."))
    return habits or [Habit("fine", "turns", "Earlier turns stay as they are when later ones follow.")]


def _system(tokenizer: PreTrainedTokenizerBase) -> Habit:
    from jinja2 import TemplateError

    mark = "Answer in rhyme."
    try:
        rendered = _render(tokenizer, [{"role": "system", "content": mark}, _USER])
    except TemplateError:
        return Habit("note", "refuses_system", "The template refuses system turns; rows that have one are refused.")
    if mark not in rendered:
        return Habit("look", "drops_system", "The template silently drops system turns.")
    return Habit("fine", "system", "System turns are kept.")


def token_row(tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair, max_length: int) -> TokenRow:
    """A pair as the trainer sees it at `max_length`, each token with its text and whether it is scored.

    Of a prompt the last `MAX_SHOWN_TOKENS` are shown, of a response the first.
    """
    room = max_length - len(pair.prompt_ids)
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    prompt = _tokens(tokenizer, [], pair.prompt_ids, ())
    chosen_tokens = _tokens(tokenizer, pair.prompt_ids, chosen, pair.chosen_scored)
    rejected_tokens = _tokens(tokenizer, pair.prompt_ids, rejected, pair.rejected_scored)
    return TokenRow(
        where=pair.where,
        prompt=prompt[-MAX_SHOWN_TOKENS:],
        chosen=chosen_tokens[:MAX_SHOWN_TOKENS],
        rejected=rejected_tokens[:MAX_SHOWN_TOKENS],
        hidden=[max(0, len(part) - MAX_SHOWN_TOKENS) for part in (prompt, chosen_tokens, rejected_tokens)],
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int], scored: Spans | None) -> list[Token]:
    """Tokens with the text that each adds to the ones before it; `scored` None: all are."""
    sequence, shift = before + ids, len(before)
    tokens = []
    for place in range(shift, len(sequence)):
        is_scored = scored is None or any(start <= place - shift < end for start, end in scored)
        tokens.append(Token(sequence[place], _added_text(tokenizer, sequence, place), is_scored))
    return tokens


def _added_text(tokenizer: PreTrainedTokenizerBase, sequence: list[int], place: int) -> str:
    """What a token adds to the text; the tokenizer's own name for it where that is not whole characters."""
    start = max(0, place - _CONTEXT_TOKENS)
    short = str(tokenizer.decode(sequence[start:place]))
    long = str(tokenizer.decode(sequence[start : place + 1]))
    added = long[len(short) :] if long.startswith(short) else ""
    return added if added and "\ufffd" not in added else str(tokenizer.convert_ids_to_tokens(sequence[place]))
