"""Texts encoded in pieces have the ids of the whole text, whatever the kind of tokenizer and its added tokens."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_utils import encoding
from data_utils.encoding import Encoder
from tests.tiny import CHATML, SPECIAL_TOKENS, TEXTS, tiny_tokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def bpe(**options) -> tuple[Tokenizer, trainers.Trainer]:
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL_TOKENS), show_progress=False, initial_alphabet=ALPHABET
    )
    return Tokenizer(models.BPE(**options)), trainer


def byte_level(**options) -> Tokenizer:
    tokenizer, trainer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    return trained(tokenizer, trainer)


def llama_3() -> Tokenizer:
    tokenizer, trainer = bpe(ignore_merges=True)
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return trained(tokenizer, trainer)


def qwen() -> Tokenizer:
    tokenizer, trainer = bpe()
    split = pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return trained(tokenizer, trainer)


def smollm() -> Tokenizer:
    tokenizer, trainer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return trained(tokenizer, trainer)


def metaspace(scheme: str) -> Tokenizer:
    tokenizer, trainer = bpe(unk_token="<pad>", fuse_unk=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return trained(tokenizer, trainer)


def llama_2() -> Tokenizer:
    """Neither splits nor trims: the normalizer puts a mark before each piece, and merges may cross words."""
    tokenizer, trainer = bpe(unk_token="<pad>", fuse_unk=True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained(tokenizer, trainer)


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<pad>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    return trained(tokenizer, trainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=list(SPECIAL_TOKENS), unk_token="<pad>", show_progress=False
    )
    return trained(tokenizer, trainer)


def trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "smollm": smollm,
    "qwen": qwen,
    "byte-level with a prefix space": lambda: byte_level(add_prefix_space=True),
    "llama 3": llama_3,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "llama 2": llama_2,
    "word piece": word_piece,
    "unigram": unigram,
}


@cache
def make(kind: str, adds_bos: bool) -> tuple[PreTrainedTokenizerFast, Encoder]:
    """A tokenizer to hold against, and the encoder of another one like it."""
    backend = KINDS[kind]()
    if adds_bos:
        specials = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend), Encoder(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()))
    )


def whole(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]


atoms = st.one_of(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "user\n", "\n", " ", "  ", "<", "|", "<|im_", "é", "🙂"]
    ),
    st.sampled_from(" ".join(TEXTS).split()),
    st.text(max_size=3),
)
texts = st.lists(atoms, max_size=14).map("".join)


@pytest.fixture(autouse=True)
def _short_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "STRIDE_CHARS", 2)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(KINDS)), st.booleans(), texts, st.booleans())
def test_pieces_have_the_ids_of_the_whole(kind: str, adds_bos: bool, text: str, as_text: bool) -> None:
    tokenizer, encoder = make(kind, adds_bos)
    assert encoder.encode([text], as_text)[text] == whole(tokenizer, text, as_text)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_are_where_texts_are_cut(kind: str) -> None:
    _, encoder = make(kind, adds_bos=True)
    assert encoder.pieces("<s>a<|im_end|>\n<|im_start|>b", as_text=False) == ["<s>a", "<|im_end|>\n", "<|im_start|>b"]


CONTENTS = ["c a", "c", "<a><b>", "b<a", "<a>b", "<b>", " <b>", "a<", "><", "<", "b"]
added_tokens = st.lists(
    st.builds(
        AddedToken,
        st.sampled_from(CONTENTS),
        lstrip=st.booleans(),
        rstrip=st.booleans(),
        single_word=st.booleans(),
        normalized=st.booleans(),
        special=st.booleans(),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda token: token.content,
)
rough_texts = st.lists(st.sampled_from([*CONTENTS, "a", " ", "\n", "c"]), max_size=10).map("".join)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(added_tokens, st.lists(rough_texts, min_size=1, max_size=4), st.sampled_from(["byte-level", "metaspace first"]))
def test_quirky_added_tokens_do_not_matter(added: list[AddedToken], texts: list[str], kind: str) -> None:
    backend = Tokenizer.from_str(made(kind))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(added)
    expected = {as_text: {text: whole(tokenizer, text, as_text) for text in texts} for as_text in (False, True)}
    encoder = Encoder(tokenizer)
    assert {as_text: encoder.encode(texts, as_text) for as_text in expected} == expected


@cache
def made(kind: str) -> str:
    return KINDS[kind]().to_str()


def test_a_token_that_another_may_reach_into_is_no_place_to_cut() -> None:
    tokenizer = tiny_tokenizer()
    assert Encoder(tokenizer).pieces("a<s>b</s>c", as_text=False) == ["a", "<s>b", "</s>c"]
    tokenizer.add_tokens([AddedToken("a<", normalized=False)])
    assert Encoder(tokenizer).pieces("a<s>b</s>c", as_text=False) == ["a<s>b</s>c"]


def test_cutting_and_padding_of_the_tokenizer_file_are_switched_off() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    expected = whole(tokenizer, TEXTS[0])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert Encoder(tokenizer).encode([TEXTS[0]], as_text=False)[TEXTS[0]] == expected


def test_pickling_keeps_the_two_ways_apart() -> None:
    encoder = pickle.loads(pickle.dumps(Encoder(tiny_tokenizer())))
    text = "<s>a</s>"
    spelled, found = (encoder.encode([text], as_text)[text] for as_text in (True, False))
    assert found[0] == 1 and found[-1] == 2 and not {1, 2} & set(spelled)


def test_threads_do_not_disturb_each_other() -> None:
    encoder = Encoder(tiny_tokenizer())
    text = "<s>Once upon</s>"
    expected = {as_text: encoder.encode([text], as_text) for as_text in (False, True)}
    with ThreadPoolExecutor(4) as pool:
        ways = [bool(number % 2) for number in range(400)]
        results = list(pool.map(lambda as_text: encoder.encode([text], as_text), ways))
    assert all(result == expected[as_text] for result, as_text in zip(results, ways, strict=True))


@pytest.mark.parametrize("kind", ["byte-level", "llama 2", "metaspace first"])
def test_offsets_are_those_of_the_whole_text_with_its_white_space(kind: str) -> None:
    _, encoder = make(kind, adds_bos=True)
    text = "<|im_start|>Once upon\n a 🙂<|im_end|>"
    offsets = encoder.offsets(text)
    assert len(offsets) == len(encoder.encode([text], as_text=False)[text])
    assert offsets[0] == (0, 12) and offsets[-1] == (len(text) - 10, len(text))
    assert set(range(len(text))) == {place for start, end in offsets for place in range(start, end)}


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_part_words(kind: str) -> None:
    _, encoder = make(kind, adds_bos=False)
    parts = ["Once", " upon", " a", " 12 cats"] if kind in ("byte-level", "smollm", "llama 3", "qwen") else None
    assert encoder.pieces("Once upon a 12 cats", as_text=True) == (parts or ["Once upon a 12 cats"])


def test_chatml_shares_what_lies_between_control_tokens() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    encoder = Encoder(tokenizer)
    texts = [f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for answer in ("Yes", "No")]
    distinct = {piece for text in texts for piece in encoder.pieces(text, as_text=False)}
    assert len(distinct) == 4 and sum(len(encoder.pieces(text, as_text=False)) for text in texts) == 8
