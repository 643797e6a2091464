"""From texts to token ids, many at once: the fast and thread-safe side of a tokenizer.

Why a text may be cut: a tokenizer of the `tokenizers` library first finds the added tokens in a text, and then
normalizes, splits and merges each piece between them by itself. So `text = head + tail` has the ids of head, then
those of tail, when the tail begins with an added token that is found there whatever stands before it. What a piece
can still see is whether it begins the text (Metaspace's `prepend_scheme: first`); the tail's first piece is that
added token, and the head begins where the text does, so neither can tell the difference.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from data_utils.schema import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import AddedToken, PreTrainedTokenizerBase

Offsets = list[tuple[int, int]]


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
        """Ids by text, each distinct text encoded once.

        Args:
            as_text: names of special tokens are spelled out like any other text.
        """
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        if self.is_fast:
            encodings = self._backends[as_text].encode_batch_fast(distinct, add_special_tokens=False)
            return {text: encoding.ids for text, encoding in zip(distinct, encodings, strict=True)}
        ids = self._tokenizer(
            distinct,
            add_special_tokens=False,
            split_special_tokens=as_text,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return dict(zip(distinct, ids, strict=True))

    def offsets(self, text: str) -> Offsets:
        """Half-open span of characters of each token of `text`, special tokens found; ascending.

        Raises:
            DataError: the tokenizer is written in Python and knows no places.
        """
        if not self.is_fast:
            name = type(self._tokenizer).__name__
            raise DataError(
                f"{name} does not tell where its tokens lie in a text; use a tokenizer with a tokenizer.json"
            )
        return self._backends[False].encode(text, add_special_tokens=False).offsets

    def cut(self, texts: Sequence[str]) -> int:
        """Where to cut texts, special tokens found, so that ids(text) = ids(text[:cut]) + ids(text[cut:]) for each.

        Returns:
            The last such place within the part that all of them share; 0 where there is none.
        """
        if self._cuts is None:
            return 0
        first, *others = texts
        common = first if all(text.startswith(first) for text in others) else _common_prefix(texts)
        last = 0
        for match in self._cuts.finditer(common):
            last = match.start()
        return last


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


def _common_prefix(texts: Sequence[str]) -> str:
    """The longest text that all of them begin with, by halving: comparing slices is faster than characters."""
    shortest = min(texts, key=len)
    low, high = 0, len(shortest)
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.startswith(shortest[:middle]) for text in texts):
            low = middle
        else:
            high = middle - 1
    return shortest[:low]
