"""From texts to token ids, many at once: the fast and thread-safe side of a tokenizer.

Why a text may be encoded in pieces: a tokenizer of the `tokenizers` library first finds the added tokens in a text, and
normalizes, splits and merges what stands between them, each piece by itself. So a text has the ids of its pieces, in
order, when each piece but the first begins with an added token that is found there whatever stands before it. What is
between two tokens can still see whether it begins the text (Metaspace's `prepend_scheme: first`); it does in the first
piece and nowhere else, cut or not.

Text without control tokens may be cut between a letter and white space where a pre-tokenizer always parts there and
sees no further back; the few patterns of which that is known are listed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from data_utils.schema import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import AddedToken, PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]

# No alternative of these matches a letter and then white space, or looks back: each begins afresh at that place.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PARTING_PATTERNS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS % r"\p{N}{1,3}",  # Llama 3
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORDS % r"\p{N}",  # Qwen 2 and 3
}
WORD_END = re.compile(r"(?<=[A-Za-z])[ \n]")
STRIDE_CHARS = 128


class Encoder:
    """Ids of texts, with nothing put around them; safe to use from several threads and to pickle.

    Args:
        tokenizer: any tokenizer, taken over: nobody else may encode with it. One of the `tokenizers` library is read
            past its Python layer, others through it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.is_fast = _is_plainly_fast(tokenizer)
        added = list(tokenizer.added_tokens_decoder.values())
        cuts = [token.content for token in added if token.special and _is_clean_cut(token, added)]
        self._cuts = alternatives(cuts) if self.is_fast else None
        self._parts_words = self.is_fast and _parts_words(tokenizer, added)
        self._open()

    def _open(self) -> None:
        """One backend per way of encoding: changing the way changes a backend, under the feet of other threads."""
        if self.is_fast:
            backend: Tokenizer = self._tokenizer.backend_tokenizer  # type: ignore[attr-defined]
            _strip(backend)
            self._backends = {False: backend, True: copy.deepcopy(backend)}
            for as_text, backend in self._backends.items():
                backend.encode_special_tokens = as_text

    def __getstate__(self) -> dict[str, Any]:
        # A pickled backend forgets how it was told to treat special tokens.
        return {name: value for name, value in vars(self).items() if name != "_backends"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def encode(self, texts: Iterable[str], as_text: bool) -> dict[str, list[int]]:
        """Ids by text. What several texts share between two control tokens is encoded once: a prompt, a header.

        Args:
            as_text: names of special tokens are spelled out like any other text.
        """
        pieces = {text: self.pieces(text, as_text) for text in texts}
        ids = self._encode(dict.fromkeys(chain.from_iterable(pieces.values())), as_text)
        return {text: list(chain.from_iterable([ids[part] for part in parts])) for text, parts in pieces.items()}

    def pieces(self, text: str, as_text: bool) -> list[str]:
        """The text, cut where it may be (see the module's docstring); a text that goes on as another is cut alike."""
        starts = [0]
        if as_text and self._parts_words:
            while match := WORD_END.search(text, starts[-1] + STRIDE_CHARS):
                starts.append(match.start())
        elif not as_text and self._cuts is not None:
            starts += [match.start() for match in self._cuts.finditer(text, 1)]
        return [text[start:end] for start, end in pairwise([*starts, len(text)])]

    def _encode(self, distinct: Iterable[str], as_text: bool) -> dict[str, list[int]]:
        texts = list(distinct)
        if not texts:
            return {}
        if self.is_fast:
            encodings = self._backends[as_text].encode_batch_fast(texts, add_special_tokens=False)
            return {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        ids = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=as_text,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return dict(zip(texts, ids, strict=True))

    def offsets(self, text: str) -> Offsets:
        """Half-open span of characters of each token of `text`, special tokens found; ascending.

        Raises:
            DataError: the tokenizer is written in Python and knows no places.
        """
        if not self.is_fast:
            name = type(self._tokenizer).__name__
            what = "a response of several turns needs the places of its tokens in the text"
            raise DataError(
                f"{what}, which {name} does not tell; use a tokenizer with a tokenizer.json or single turns"
            )
        return self._backends[False].encode(text, add_special_tokens=False).offsets


def alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the texts, the longest first where several begin alike; None for no texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _strip(backend: Tokenizer) -> None:
    """Leave a backend that neither cuts nor pads texts, nor trims white space off the places of its tokens."""
    from tokenizers.processors import Sequence as Processors

    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = Processors([])


def _is_plainly_fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's Python layer only passes texts on to its backend."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    passes_on = kind.__call__ is PreTrainedTokenizerFast.__call__
    passes_on = passes_on and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    return passes_on and issubclass(kind, PreTrainedTokenizerFast)


def _is_clean_cut(token: AddedToken, added: Sequence[AddedToken]) -> bool:
    """Whether a text may be cut before `token` wherever its content stands (see the module's docstring).

    That is so when it is found before normalization and does not look to its left, when no added token on its left
    looks at its first character (`rstrip` takes white space, `single_word` asks for the end of a word), and when no
    added token can begin before it and end inside or after it, or begin with it and be longer.
    """
    content = token.content
    if token.normalized or token.lstrip or token.rstrip or token.single_word or not re.match(r"[^\w\s]", content):
        return False
    return not any(_straddles(other.content, content) for other in added)


def _straddles(other: str, content: str) -> bool:
    """Whether an occurrence of `other` can hold the place before an occurrence of `content`, or prolong it."""
    if other != content and other.startswith(content):
        return True
    ends = (other[start:] for start in range(1, len(other)))
    return any(end.startswith(content) or content.startswith(end) for end in ends)


def _parts_words(tokenizer: Any, added: Sequence[AddedToken]) -> bool:
    """Whether spelled-out text may be cut at each `WORD_END`: the pre-tokenizer parts there, nothing reaches across."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None or not (backend.normalizer is None or type(backend.normalizer).__name__ == "NFC"):
        return False
    if any(t.lstrip or t.rstrip or t.single_word or WORD_END.search(t.content) for t in added):
        return False
    config = json.loads(backend.pre_tokenizer.__getstate__())
    steps = config["pretokenizers"] if config["type"] == "Sequence" else [config]
    kinds = [_parting_step(step) for step in steps]
    return None not in kinds and True in kinds


def _parting_step(step: dict[str, Any]) -> bool | None:
    """Whether a step of a pre-tokenizer parts words; None where it is not known to see no further than them."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(parts)}:
            return parts
        case {"type": "Digits"}:
            return False
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return True if pattern in PARTING_PATTERNS else None
    return None
