"""Conversations written as one text with a mark before each turn."""

from __future__ import annotations

import re
import reprlib

from data_utils.schema import Message, RowError

HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


def is_transcript(text: object) -> bool:
    r"""Whether a text begins as those of Anthropic's HH sets do: "\n\nHuman: ..."."""
    return isinstance(text, str) and text.lstrip().startswith("Human:")


def read_transcript(text: str, name: str, where: str) -> list[Message]:
    r"""The turns of "\n\nHuman: ...\n\nAssistant: ...", without the white space around them.

    Raises:
        RowError: cause `transcript`.
    """
    before, *parts = HH_TURN.split(text)
    if before or not parts:
        message = f"{name} begins with {reprlib.repr(text)}, where a transcript begins with 'Human:'"
        raise RowError(where, "transcript", f"{message}; add a prompt or fix the row")
    return _turns(parts)


def read_transcript_prompt(text: str, name: str, where: str) -> list[Message]:
    """The same where the text stops at, or before, the mark of the turn that is asked for."""
    turns = read_transcript(text, name, where)
    asks = turns[-1] == {"role": "assistant", "content": ""}
    return turns[:-1] if asks else turns


def read_helpsteer_prompt(text: str) -> list[Message]:
    """HelpSteer2's prompt: the first user turn without a mark, then marked turns; most have only that one."""
    first, *parts = HELPSTEER_TURN.split(text)
    return [{"role": "user", "content": first}, *_turns(parts)]


def _turns(parts: list[str]) -> list[Message]:
    """Mark, text, mark, text, ... as turns."""
    marks, texts = parts[::2], parts[1::2]
    return [{"role": ROLES[mark], "content": text.strip()} for mark, text in zip(marks, texts, strict=True)]
