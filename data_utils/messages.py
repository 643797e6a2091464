"""Lists of messages: each message checked and brought to one shape, the turns in an order that chat templates know."""

from __future__ import annotations

import json
import reprlib
from typing import Any

from data_utils.schema import Message, RowError, Tool
from data_utils.values import kind, list_keys

OPTIONAL_KEYS = ("tool_calls", "name", "tool_call_id")
ROLES = ("system", "developer", "user", "assistant", "tool")
FOLLOWERS = {  # role -> roles of the next turn
    "": ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
TURN_ORDER = "at most one system turn, then user and assistant in turn, tool turns after an assistant's tool_calls"


def read_messages(messages: list[Any], name: str, where: str) -> list[Message]:
    """The messages with no other keys than those that a chat template reads.

    Args:
        name: what the list is, for messages: "chosen", say.

    Raises:
        RowError: cause `schema` or `roles`.
    """
    return [_read_message(message, name, number, where) for number, message in enumerate(messages, start=1)]


def _read_message(message: Any, name: str, number: int, where: str) -> Message:
    # Nearly every message is two strings; what else it may hold is looked at below.
    if isinstance(message, dict) and len(message) == 2 and message.get("role") in ROLES:
        content = message.get("content")
        if isinstance(content, str):
            return {"role": message["role"], "content": content}
    place = f"{name}, message {number}"
    _check_keys(message, place, where)
    read: Message = {"role": message["role"]}
    tool_calls = message.get("tool_calls")
    if message.get("content") is not None or not tool_calls:
        read["content"] = _read_content(message.get("content"), place, where)
    if tool_calls:
        _check_functions(tool_calls, f"tool_calls of {place}", where)
    return read | {key: message[key] for key in OPTIONAL_KEYS if message.get(key)}


def _check_keys(message: Any, place: str, where: str) -> None:
    if not isinstance(message, dict):
        raise RowError(where, "schema", f"{place} is {kind(message)}; it must be an object with role and content")
    if "role" not in message or not ("content" in message or message.get("tool_calls")):
        hint = "; ShareGPT turns? rename from/value to role/content" if "from" in message else ""
        raise RowError(where, "schema", f"{place} needs the keys role and content; found: {list_keys(message)}{hint}")
    if message["role"] not in ROLES:
        role = reprlib.repr(message["role"])
        raise RowError(where, "roles", f"{place} has the role {role}; known: {', '.join(ROLES)}")
    if message.get("tool_calls") and message["role"] != "assistant":
        raise RowError(
            where, "roles", f"{place} has tool_calls, but is the {message['role']}'s; only an assistant's may"
        )


def _read_content(content: object, place: str, where: str) -> str:
    """A string, or the parts of a list joined, provided that all of them are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(where, "schema", f"{place} has a content that is {kind(content)}, not a string")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = reprlib.repr(part.get("type")) if isinstance(part, dict) else kind(part)
            message = f"{place} has a content part of the type {found}; this trainer reads only text parts"
            raise RowError(where, "schema", f"{message}, drop the row or the part")
    return "".join(part["text"] for part in content)


def _check_functions(functions: object, name: str, where: str) -> None:
    """Tools and tool calls alike: a list of objects, each with a name, which may stand under `function`."""
    if not isinstance(functions, list):
        raise RowError(where, "schema", f"{name} is {kind(functions)}; it must be a list of objects")
    for number, function in enumerate(functions, start=1):
        if not isinstance(function, dict):
            raise RowError(where, "schema", f"{name}, number {number} is {kind(function)}; it must be an object")
        described = function["function"] if isinstance(function.get("function"), dict) else function
        if not isinstance(described.get("name"), str):
            raise RowError(where, "schema", f"{name}, number {number} names no function; found: {list_keys(function)}")


def read_tools(tools: object, where: str) -> tuple[Tool, ...]:
    """Column `tools`: a list of JSON schemas, or that list as a JSON string; nothing, where it is empty.

    Raises:
        RowError: cause `schema`.
    """
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            message = f"column tools is a string, but not JSON ({error}); it must be a list of JSON schemas"
            raise RowError(where, "schema", message) from error
    if not tools:
        return ()
    _check_functions(tools, "column tools", where)
    assert isinstance(tools, list)
    return tuple(tools)


def check_turns(prompt: list[Message], response: list[Message], name: str, where: str) -> None:
    """A prompt that ends with the user (or a tool), then a response from the assistant's turn to the assistant's turn.

    Raises:
        RowError: cause `roles`, `empty_prompt` or `empty_response`.
    """
    last = response[-1]["role"] if response else ""
    if response and last != "assistant":
        raise RowError(where, "roles", f"the last turn of {name} is the {last}'s; it must be the assistant's")
    if not any(turn["role"] == "user" for turn in prompt):
        raise RowError(where, "empty_prompt", f"{name} has no user turn before the response that both share")
    _check_order(prompt + response, name, where)
    if not response or response[0]["role"] != "assistant":
        problem = f"begins with the {response[0]['role']}'s turn" if response else "is empty"
        raise RowError(where, "roles", f"{name} {problem} after the prompt; it must be the assistant's")
    for turn in response:
        if turn["role"] == "assistant" and "tool_calls" not in turn and not turn["content"].strip():
            message = f"{name} is empty or only white space (an assistant's turn without content)"
            raise RowError(where, "empty_response", f"{message}; drop or fix the row")


def _check_order(turns: list[Message], name: str, where: str) -> None:
    previous = ""
    for place, turn in enumerate(turns):
        role = turn["role"]
        if role not in FOLLOWERS[previous]:
            due = " or ".join(f"the {role}'s" for role in FOLLOWERS[previous])
            message = f"turn {place + 1} of prompt + {name} is the {role}'s, where {due} is due"
            raise RowError(where, "roles", f"{message}; {TURN_ORDER}")
        if role == "tool" and previous == "assistant" and "tool_calls" not in turns[place - 1]:
            message = f"turn {place + 1} of prompt + {name} is a tool's, but the turn before has no tool_calls"
            raise RowError(where, "roles", f"{message}; {TURN_ORDER}")
        previous = role


def shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """How many first turns are the prompt of both: all that are equal, up to where both go on with the assistant's."""
    size = 0
    while size < min(len(chosen), len(rejected)) - 1 and chosen[size] == rejected[size]:
        size += 1
    while size and not chosen[size]["role"] == rejected[size]["role"] == "assistant":
        size -= 1
    return size
