"""Chat templates that loop, grow or reach for attributes: ended or refused within seconds."""

from __future__ import annotations

import time

import pytest

from data_utils.bounded import Guard, OutOfBounds, try_out
from data_utils.chat import ChatTemplate
from data_utils.schema import DataError, PairColumns, PreferencePair, RowError
from tests.tiny import CHATML, tiny_tokenizer

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROW = "{% set ns = namespace(s='x' * 1000000) %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
BIG = "{{ 'x' * 100000000000 }}"
REACH = "{{ messages.__class__.__mro__ }}"
TOO_LONG, TOO_MUCH = "runs for more than 5 s", "more than 1 GiB of memory"
MESSAGES = [{"role": "user", "content": "a"}]


def render(template: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    pair = PreferencePair(
        MESSAGES,  # type: ignore[arg-type]
        [{"role": "assistant", "content": "b"}],
        [{"role": "assistant", "content": "c"}],
        PairColumns(),
        "rows:1",
    )
    ChatTemplate(tokenizer)(pair)


@pytest.mark.parametrize(
    ("template", "reason"),
    [(LOOP, TOO_LONG), (GROW, f"({TOO_MUCH}|{TOO_LONG})"), (BIG, TOO_MUCH)],  # a busy machine may not get to copy 1 GiB
)
def test_a_template_without_bounds_is_refused_before_it_is_used(template: str, reason: str) -> None:
    since = time.monotonic()
    with pytest.raises(DataError, match=f"chat template is refused: it .*{reason}"):
        render(template)
    assert time.monotonic() - since < 15


def test_a_template_that_reaches_for_attributes_is_a_bad_row() -> None:
    with pytest.raises(RowError, match="unsafe"):
        render(REACH)


def test_a_template_of_good_manners_is_not_refused() -> None:
    render(CHATML)


def test_an_action_that_fails_by_itself_is_no_matter_of_bounds() -> None:
    try_out(lambda: 1 / 0)


def spin(guard: Guard) -> None:
    with guard.watching():
        while True:
            time.sleep(0.001)


def test_a_rendering_that_gets_long_later_is_ended() -> None:
    guard, since = Guard(max_s=0.3), time.monotonic()
    with pytest.raises(OutOfBounds):
        spin(guard)
    assert time.monotonic() - since < 5
    with guard.watching():
        pass
