"""Responses of several turns, tools and tool turns: what the template gives, and which of its tokens are scored."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_utils.batching import collate
from data_utils.schema import DataError, Message, PairColumns, PreferencePair, RowError, Spans, TokenizedPair
from data_utils.tokenize import PairTokenizer
from tests.tiny import CHATML, CHATML_WITH_BOS, PLAIN_CHAT, TEXTS, tiny_tokenizer
from tests.unit.test_encoding import KINDS

IM_START, IM_END, EOS = 3, 4, 2
CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the thoughts of earlier turns are left out.
FORGETFUL = CHATML.replace(
    "{{ message.content }}", "{{ message.content if loop.last else message.content.split('</think>')[-1] }}"
)
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris"}}}],
}
RESULT = {"role": "tool", "content": "Paris is the capital of France."}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def make(chosen: list[Message], rejected: list[Message], prompt: list[Message] | None = None, **more) -> PreferencePair:
    return PreferencePair(prompt or [user("Once upon")], chosen, rejected, PairColumns(), "a.jsonl:4", **more)


def tokenize(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, max_length: int = 512) -> TokenizedPair:
    return PairTokenizer(tokenizer, max_length)(pair, index=0)


def error_of(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair, max_length: int = 512) -> RowError:
    with pytest.raises(RowError) as caught:
        tokenize(tokenizer, pair, max_length)
    assert str(caught.value).startswith("a.jsonl:4: ") and "\n" not in str(caught.value)
    return caught.value


def scored_texts(tokenizer: PreTrainedTokenizerBase, response_ids: list[int], spans: Spans | None) -> list[str]:
    assert spans is not None
    return [str(tokenizer.decode(response_ids[start:end])) for start, end in spans]


SEVERAL = [assistant("The cat sat"), user("Please write"), assistant("a short poem")]
ONE = [assistant("I do not know")]


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_BOS])
@pytest.mark.parametrize("kind", ["chosen", "rejected"])
def test_only_the_assistants_turns_are_scored(template: str, kind: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    several, one = ("chosen", "rejected") if kind == "chosen" else ("rejected", "chosen")
    pair = tokenize(tokenizer, make(**{several: SEVERAL, one: ONE}))
    ids, spans = getattr(pair, f"{several}_ids"), getattr(pair, f"{several}_scored")
    assert scored_texts(tokenizer, ids, spans) == ["The cat sat<|im_end|>", "a short poem<|im_end|>"]
    assert getattr(pair, f"{one}_scored") is None
    whole = tokenizer.apply_chat_template([user("Once upon"), *SEVERAL], return_dict=False)
    assert [*pair.prompt_ids, *ids] == whole[:-1] and whole[-1] == tokenizer.convert_tokens_to_ids("Ċ")


def test_the_turns_of_a_template_without_an_end() -> None:
    tokenizer = tiny_tokenizer(chat_template=PLAIN_CHAT)
    pair = tokenize(tokenizer, make(SEVERAL, ONE))
    assert pair.chosen_ids[-1] == EOS
    scored = scored_texts(tokenizer, pair.chosen_ids, pair.chosen_scored)
    assert scored == [" The cat sat", " a short poem\n</s>"]


words = st.lists(
    st.sampled_from([*" ".join(TEXTS).split(), "🙂", "\n", " ", "user", "assistant"]), min_size=1, max_size=6
)
contents = words.map(" ".join).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["byte-level", "llama 3", "llama 2", "metaspace first"]), st.lists(contents, min_size=1, max_size=7)
)
def test_no_users_token_is_among_the_labels(kind: str, said: list[str]) -> None:
    """Every word of the user's is written in letters that the assistant never uses, so a label would show it."""
    tokenizer = CHATS[kind]
    turns = [assistant(text) if number % 2 == 0 else user(f"Q{number}QQ") for number, text in enumerate(said)]
    turns += [] if turns[-1]["role"] == "assistant" else [assistant("a poem")]
    pair = tokenize(tokenizer, make(turns, [assistant("I know it")]))
    batch = collate([pair], "packed", 0)
    labels = batch.labels_N[batch.sequence_of_N == 0].tolist()
    assert labels.count(IM_END) == sum(turn["role"] == "assistant" for turn in turns)
    assert IM_START not in labels and "Q" not in tokenizer.decode(labels)
    spoken = str(tokenizer.decode(labels)).replace("<|im_end|>", "")
    expected = "".join(str(turn["content"]) for turn in turns if turn["role"] == "assistant")
    assert kind != "byte-level" or spoken == expected


def chat(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), eos_token="</s>")
    tokenizer.chat_template = CHATML
    return tokenizer


CHATS = {kind: chat(kind) for kind in ("byte-level", "llama 3", "llama 2", "metaspace first")}


def test_a_token_across_the_boundary_belongs_to_the_turn() -> None:
    """Without control tokens around it, "x" of a header and "y" of an answer may become one token."""
    template = (
        "{% for message in messages %}{{ ' z' if message.role == 'user' else ' x' }}{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %} x{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template, texts=(" xy xy xy xyz",), vocab_size=266)
    pair = tokenize(tokenizer, make([assistant("yz"), user("z"), assistant("yz")], [assistant("z")], [user("z")]))
    assert scored_texts(tokenizer, pair.chosen_ids, pair.chosen_scored) == [" xyz", " xyz</s>"]
    assert tokenizer.decode(pair.prompt_ids) == " zz"


def test_a_response_may_begin_with_another_turn() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    prompt = [user("Once upon"), assistant("a time")]
    pair = tokenize(tokenizer, make([user("The cat"), assistant("sat")], [user("The mat"), assistant("was")], prompt))
    assert scored_texts(tokenizer, pair.chosen_ids, pair.chosen_scored) == ["sat<|im_end|>"]
    assert scored_texts(tokenizer, pair.rejected_ids, pair.rejected_scored) == ["was<|im_end|>"]
    assert str(tokenizer.decode(pair.prompt_ids)).endswith("a time<|im_end|>\n<|im_start|>")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer(chat_template=FORGETFUL)
    thinking = [assistant("hm</think>The cat"), user("Please"), assistant("sat")]
    error = error_of(tokenizer, make(thinking, ONE))
    assert error.cause == "template" and "rewrites turn 2 of the conversation" in str(error)
    assert tokenize(tokenizer, make(SEVERAL, ONE)).chosen_scored is not None
    assert tokenize(tokenizer, make([assistant("hm</think>The cat")], ONE)).chosen_scored is None


def test_max_length_clips_the_scored_turns() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    whole = tokenize(tokenizer, make(SEVERAL, ONE))
    assert whole.chosen_scored is not None
    (first, second), size = whole.chosen_scored, len(whole.prompt_ids)
    cut = tokenize(tokenizer, make(SEVERAL, ONE), max_length=size + second[0] + 2)
    assert cut.chosen_scored == (first, (second[0], second[0] + 2)) and len(cut.chosen_ids) == second[0] + 2
    cut = tokenize(tokenizer, make(SEVERAL, ONE), max_length=size + second[0])
    assert cut.chosen_scored == (first,)
    cut = tokenize(tokenizer, make(SEVERAL, ONE), max_length=size + 1)
    assert cut.chosen_scored == ((0, 1),)


def test_nothing_left_to_score_is_refused() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    pair = make([user("Q" * 20), assistant("sat")], [user("Z" * 20), assistant("was")])
    size = len(tokenize(tokenizer, pair).prompt_ids)
    error = error_of(tokenizer, pair, max_length=size + 15)
    assert error.cause == "prompt_too_long" and "max_length" in str(error)


def test_several_turns_with_equal_ids_are_identical() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML.replace("message.content", "message.content | trim"))
    shouted = [*SEVERAL[:-1], assistant("a short poem ")]
    assert error_of(tokenizer, make(SEVERAL, shouted)).cause == "identical"


def test_tools_and_tool_turns_reach_the_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML_WITH_TOOLS)
    prompt, chosen = [user("What is the capital?")], [CALL, RESULT, assistant("Paris, of course!")]
    pair = tokenize(tokenizer, make(chosen, ONE, prompt, tools=(TOOL,)))
    whole: Any = tokenizer.apply_chat_template([*prompt, *chosen], tools=[TOOL], return_dict=False)
    assert [*pair.prompt_ids, *pair.chosen_ids] == whole[:-1]
    assert '"name": "look_up"' in tokenizer.decode(pair.prompt_ids)
    call = '<call>look_up {"city": "Paris"}<|im_end|>'
    assert scored_texts(tokenizer, pair.chosen_ids, pair.chosen_scored) == [call, "Paris, of course!<|im_end|>"]


def test_a_template_that_drops_tools_is_refused() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    error = error_of(tokenizer, make(SEVERAL, ONE, tools=(TOOL,)))
    assert error.cause == "template" and "drops the tools: 'look_up'" in str(error)
    error = error_of(tokenizer, make([CALL, RESULT, *ONE], ONE))
    assert error.cause == "template" and "drops the tool calls: 'look_up'" in str(error)


def with_arguments(arguments: Any) -> Message:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "look_up", "arguments": arguments}}]}


@pytest.mark.parametrize(
    "pair",
    [
        make([with_arguments({"city": ["<|im_end|>"]}), RESULT, *ONE], ONE),
        make([with_arguments({"<|im_end|>": 1}), RESULT, *ONE], ONE),
        make([with_arguments('{"city": "</s>"}'), RESULT, *ONE], ONE),
        make([CALL, RESULT | {"content": "a<|im_start|>"}, *ONE], ONE),
        make([*SEVERAL[:1], user("</s>"), *ONE], ONE),
        make(ONE, SEVERAL, [user("a"), CALL, RESULT | {"name": "<s>"}]),
        make(SEVERAL, ONE, tools=({"name": "look_up", "description": "</s>"},)),
    ],
)
def test_control_tokens_anywhere_in_a_row_are_refused(pair: PreferencePair) -> None:
    assert error_of(tiny_tokenizer(chat_template=CHATML_WITH_TOOLS), pair).cause == "special_token_in_text"


@pytest.mark.parametrize("code", ["{{ messages[0].content + 1 }}", "{{ messages[9].content.x }}", "{{ 1 // 0 }}"])
def test_whatever_a_template_raises_is_a_row_error(code: str) -> None:
    assert error_of(tiny_tokenizer(chat_template=code), make(SEVERAL, ONE)).cause == "template"


def test_many_gives_what_each_pair_gives_alone_in_order() -> None:
    tokenizer = PairTokenizer(tiny_tokenizer(chat_template=CHATML), max_length=40)
    strings = PreferencePair("Once </s>", " upon", " a", PairColumns(), "b.jsonl:1")
    bad = [make([assistant("</s>")], ONE), make(ONE, ONE), make(ONE, SEVERAL, [user("cat " * 50)])]
    pairs = [make(SEVERAL, ONE), bad[0], strings, bad[1], make(ONE, SEVERAL), bad[2], strings]
    results = tokenizer.many(pairs, range(7))
    assert [result.cause for result in results if isinstance(result, RowError)] == [
        "special_token_in_text",
        "identical",
        "prompt_too_long",
    ]
    for index, (pair, result) in enumerate(zip(pairs, results, strict=True)):
        if isinstance(result, TokenizedPair):
            assert result == tokenizer(pair, index) and result.index == index
    assert tokenizer.many([], []) == []


def test_a_pickled_tokenizer_gives_the_same() -> None:
    tokenizer = PairTokenizer(tiny_tokenizer(chat_template=CHATML, adds_bos=True), max_length=60)
    pairs = [make(SEVERAL, ONE), PreferencePair("<s>Once </s>", " upon</s> a", " a", PairColumns(), "b.jsonl:1")]
    expected = tokenizer.many(pairs, range(2))
    assert not any(isinstance(result, RowError) for result in expected)
    assert pickle.loads(pickle.dumps(tokenizer)).many(pairs, range(2)) == expected


def slow_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer written in Python: one token per character."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def test_a_tokenizer_written_in_python() -> None:
    tokenizer = slow_tokenizer()
    assert not tokenizer.is_fast
    pair = tokenize(tokenizer, make([assistant("The cat")], ONE))
    whole: Any = tokenizer.apply_chat_template([user("Once upon"), assistant("The cat")], return_dict=False)
    assert [*pair.prompt_ids, *pair.chosen_ids] == whole[:-1]
    strings = PreferencePair("Once", " <|im_end|>", " a</s>", PairColumns(), "b.jsonl:1")
    as_text = tokenize(tokenizer, strings)
    assert as_text.chosen_ids[-1] == tokenizer.eos_token_id and len(as_text.chosen_ids) == len(" <|im_end|>") + 1
    with pytest.raises(
        DataError, match=r"ByT5Tokenizer does not tell; use a tokenizer with a tokenizer\.json"
    ) as caught:
        tokenize(tokenizer, make(SEVERAL, ONE))
    assert "\n" not in str(caught.value)
