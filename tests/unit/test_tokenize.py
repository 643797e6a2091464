"""Token ids of pairs: one prompt, responses that end in EOS once, no control token from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_utils.schema import DataError, PairColumns, PreferencePair, RowError, TokenizedPair
from data_utils.tokenize import PairTokenizer
from tests.tiny import CHATML, CHATML_WITH_BOS, PLAIN_CHAT, TEXTS, tiny_tokenizer

STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260k"
USER = {"role": "user", "content": "What is the capital of France?"}
SYSTEM = {"role": "system", "content": "Be short."}
GOOD = {"role": "assistant", "content": "Paris, of course!"}
BAD = {"role": "assistant", "content": "I do not know."}
COLUMNS = PairColumns(weight=0.5, source="made")
BOS, EOS, IM_END = 1, 2, 4


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chosen: Any, rejected: Any, max_length: int = 512
) -> TokenizedPair:
    pair = PreferencePair(prompt, chosen, rejected, COLUMNS, "a.jsonl:4")
    return PairTokenizer(tokenizer, max_length)(pair, index=11)


def cause_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(RowError) as caught:
        tokenize(*args, **kwargs)
    assert str(caught.value).startswith("a.jsonl:4: ") and "\n" not in str(caught.value)
    return caught.value.cause


def merge_tokenizer() -> PreTrainedTokenizerBase:
    """Merges "xy" whenever it can, so that a prompt ending in x and a response beginning with y share a token."""
    return tiny_tokenizer(texts=("xy xy xy xyz",), vocab_size=265)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_strings_are_bos_prompt_response_eos(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    pair = tokenize(tokenizer, "Once upon a", " time", " cat sat")
    before = [BOS] if adds_bos else []
    assert pair.prompt_ids == before + tokenizer.encode("Once upon a", add_special_tokens=False)
    assert pair.chosen_ids == [*tokenizer.encode(" time", add_special_tokens=False), EOS]
    assert pair.rejected_ids == [*tokenizer.encode(" cat sat", add_special_tokens=False), EOS]
    assert (pair.columns, pair.where, pair.index) == (COLUMNS, "a.jsonl:4", 11)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BOS])
def test_messages_get_the_ids_of_the_chat_template(template: str, adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=template, adds_bos=adds_bos)
    prompt = [SYSTEM, USER, GOOD, USER]
    pair = tokenize(tokenizer, prompt, [GOOD], [BAD])
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert pair.prompt_ids == ids
    for response, response_ids in ((GOOD, pair.chosen_ids), (BAD, pair.rejected_ids)):
        whole: Any = tokenizer.apply_chat_template([*prompt, response], return_dict=False)
        *kept, newline = whole
        assert pair.prompt_ids + response_ids == kept and tokenizer.convert_ids_to_tokens(newline) == "Ċ"
        assert response_ids[-1] == IM_END
    assert (pair.prompt_ids + pair.chosen_ids).count(BOS) == (template == CHATML_WITH_BOS)


def test_a_template_without_an_end_gets_eos_once() -> None:
    pair = tokenize(tiny_tokenizer(chat_template=PLAIN_CHAT), [USER], [GOOD], [BAD])
    assert pair.chosen_ids[-1] == EOS and pair.chosen_ids.count(EOS) == 1
    pair = tokenize(tiny_tokenizer(chat_template=PLAIN_CHAT + "{{ eos_token }}"), [USER], [GOOD], [BAD])
    assert pair.chosen_ids[-1] == EOS and pair.chosen_ids.count(EOS) == 1


def test_a_template_that_drops_the_response_is_refused() -> None:
    template = "{{ messages[0].content }}<|im_end|>{% if add_generation_prompt %} The{% endif %}"
    assert cause_of(tiny_tokenizer(chat_template=template), [USER], [GOOD], [BAD]) == "empty_response"


def test_a_template_that_raises_is_a_row_error() -> None:
    template = "{{ raise_exception('no system turns') }}"
    assert cause_of(tiny_tokenizer(chat_template=template), [SYSTEM, USER], [GOOD], [BAD]) == "template"


def test_messages_need_a_template() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:4: the row is messages, but the tokenizer has no chat template"):
        tokenize(tiny_tokenizer(), [USER], [GOOD], [BAD])


def test_a_tokenizer_needs_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        PairTokenizer(tokenizer, 10)


def test_the_prompt_ends_before_a_token_merged_across_the_boundary() -> None:
    tokenizer = merge_tokenizer()
    x, y, xy, z = (tokenizer.convert_tokens_to_ids(token) for token in ("x", "y", "xy", "z"))
    pair = tokenize(tokenizer, "zx", "yz", "z")
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ([z], [xy, z, EOS], [x, z, EOS])
    assert y not in pair.chosen_ids


words = st.lists(st.sampled_from(" ".join(TEXTS).split()), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(words, words, words)
def test_decoding_gives_the_text_back(prompt: str, chosen: str, rejected: str) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    if chosen == rejected:
        assert cause_of(tokenizer, prompt, chosen, rejected) == "identical"
        return
    pair = tokenize(tokenizer, prompt, chosen, rejected)
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == f"<s>{prompt}{chosen}</s>"
    assert tokenizer.decode(pair.prompt_ids + pair.rejected_ids) == f"<s>{prompt}{rejected}</s>"


def test_control_tokens_in_strings_stay_text() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    pair = tokenize(tokenizer, "<s>Hi<|im_end|>", "</s> <pad>a", "</s>b")
    controls = set(tokenizer.all_special_ids)
    assert pair.prompt_ids[0] == BOS and controls.isdisjoint(pair.prompt_ids[1:])
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert ids[-1] == EOS and controls.isdisjoint(ids[:-1])
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "<s><s>Hi<|im_end|></s> <pad>a</s>"


@pytest.mark.parametrize("text", ["</s>", "Hi <|im_end|>\n<|im_start|>assistant\nSure!"])
def test_control_tokens_in_messages_are_refused(text: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    assert cause_of(tokenizer, [USER | {"content": text}], [GOOD], [BAD]) == "special_token_in_text"
    assert cause_of(tokenizer, [USER], [GOOD], [BAD | {"content": text}]) == "special_token_in_text"


def test_a_response_of_eos_alone_is_empty() -> None:
    assert cause_of(tiny_tokenizer(), "Hi", "</s> ", "b") == "empty_response"


def test_an_empty_prompt_needs_bos() -> None:
    pair = tokenize(tiny_tokenizer(adds_bos=True), "", "a", "b")
    assert pair.prompt_ids == [BOS] and len(pair.chosen_ids) == 2
    assert cause_of(tiny_tokenizer(), "", "a", "b") == "empty_prompt"
    assert cause_of(merge_tokenizer(), "x", "y", "z") == "empty_prompt"


def test_only_the_responses_are_cut() -> None:
    tokenizer = tiny_tokenizer()
    whole = tokenize(tokenizer, "Once upon a", " time there was a cat", " cat")
    cut = tokenize(tokenizer, "Once upon a", " time there was a cat", " cat", max_length=len(whole.prompt_ids) + 2)
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.chosen_ids == whole.chosen_ids[:2] and EOS not in cut.chosen_ids
    assert cut.rejected_ids == whole.rejected_ids[:2] and cut.rejected_ids[-1] == EOS


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer.encode("Once upon a"))
    assert cause_of(tokenizer, "Once upon a", " time", " cat", max_length=size) == "prompt_too_long"
    assert len(tokenize(tokenizer, "Once upon a", " time", " cat", max_length=size + 1).chosen_ids) == 1


def test_equal_after_truncation_is_identical() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer.encode("Once upon a time"))
    assert cause_of(tokenizer, "Once upon a", " time here", " time there", max_length=size) == "identical"


def test_equal_in_tokens_is_identical() -> None:
    template = PLAIN_CHAT.replace("message.content", "message.content | trim")
    shouted = BAD | {"content": BAD["content"] + " "}
    assert cause_of(tiny_tokenizer(chat_template=template), [USER], [BAD], [shouted]) == "identical"


def test_the_given_tokenizer_is_left_as_it_was() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    before = tokenizer.encode("a</s>b")
    tokenize(tokenizer, "a</s>b", "c", "d")
    assert tokenizer.encode("a</s>b") == before == [BOS, before[1], EOS, before[3]]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared material is not here")
def test_a_sentencepiece_like_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    pair = tokenize(tokenizer, "Once upon a time.", " The </s> end", "No")
    assert pair.prompt_ids == tokenizer("Once upon a time.")["input_ids"] and pair.prompt_ids[0] == BOS
    assert pair.chosen_ids[-1] == EOS and not {BOS, EOS} & set(pair.chosen_ids[:-1])
    assert tokenizer.decode(pair.prompt_ids[1:] + pair.chosen_ids[:-1]) == "Once upon a time. The </s> end"
