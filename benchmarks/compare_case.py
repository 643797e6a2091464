"""What the trainers under comparison get alike: a random model, its tokenizer, and seeded pairs, in one folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.chat_bpe import train_bpe
from benchmarks.length_models import LENGTH_MODELS, drawn_pairs
from benchmarks.random_model import Shape, write_weights, write_word_tokenizer
from data_utils.schema import PreferencePair, RowError, TokenizedPair
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CaseError(ValueError):
    """The data cannot make a case; one line."""


@dataclass(frozen=True, slots=True)
class CaseSize:
    """The sizes of a case.

    Attributes:
        shape: of the random Llama; a trained tokenizer may have fewer tokens than its vocabulary.
        pairs: pairs per step; every step takes them all.
        micro_batch: the rival's pairs per micro-batch.
        tokenized: pairs on which tokenizing is timed.
        dtype: of the weights on disk.
        device: on which they are drawn.
    """

    shape: Shape
    pairs: int
    max_length: int
    micro_batch: int
    lora_rank: int
    tokenized: int
    dtype: str = "float32"
    device: str = "cpu"


PINNED = CaseSize(
    Shape(3000, hidden=192, ffn=576, layers=4, heads=6, kv_heads=3, initializer_range=0.05),
    pairs=64,
    max_length=1024,
    micro_batch=8,
    lora_rank=16,
    tokenized=1000,
)
"""The CPU case that goals are stated for."""
TINY = CaseSize(
    Shape(512, hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, initializer_range=0.1),
    pairs=16,
    max_length=256,
    micro_batch=4,
    lora_rank=4,
    tokenized=40,
)
"""For tests: seconds, and counts that are as exact as the pinned case's."""


@dataclass(frozen=True, slots=True)
class Case:
    """A case on disk: `model/` (weights and tokenizer), `pairs.jsonl`, `tokenize.jsonl`.

    Attributes:
        tokens: sums over the pairs: prompt, chosen, rejected.
        lengths: tokens of the longer sequence of each pair, by which a rival may group.
        ids_sha256: of all token ids, pair by pair; what both trainers must train on.
        pairs_sha256: of pairs.jsonl.
        dropped: pairs that were drawn and could not be used, by cause.
    """

    folder: str
    size: CaseSize
    data: str
    seed: int
    tokens: dict[str, int]
    lengths: list[int]
    ids_sha256: str
    pairs_sha256: str
    dropped: dict[str, int]

    @property
    def model(self) -> str:
        """The folder with weights and tokenizer."""
        return f"{self.folder}/model"

    @property
    def shard(self) -> str:
        """The file of the pairs of every step."""
        return f"{self.folder}/pairs.jsonl"

    @property
    def prompt_factor(self) -> float:
        """(2P + C + R) / (P + C + R)."""
        return 1 + self.tokens["prompt"] / sum(self.tokens.values())

    def rows(self, name: str = "pairs.jsonl") -> list[dict[str, Any]]:
        """The rows of one of its files."""
        return [json.loads(line) for line in (Path(self.folder) / name).read_text().splitlines()]

    def facts(self) -> dict[str, Any]:
        """For a record: everything but where it lay and each pair's length."""
        facts = asdict(self) | {"prompt_factor": round(self.prompt_factor, 4)}
        return {key: value for key, value in facts.items() if key not in ("folder", "lengths")}


def case_of_files(folder: Path, size: CaseSize, files: Sequence[str], seed: int) -> Case:
    """A case of real pairs with a BPE trained on all of them; pairs that cannot be used (an empty side, tools,
    responses of several turns, too long a prompt) are left out.

    Raises:
        DataError: a file cannot be read.
        CaseError: fewer sound pairs than a step takes.
    """
    shards = ShardSet.open(list(files))
    dropped: Counter[str] = Counter()
    pairs = list(_usable(shards, dropped))
    tokenizer = train_bpe(pairs, size.shape.vocabulary)
    Random(seed).shuffle(pairs)
    names = ", ".join(Path(file).name for file in files)
    return _write(folder, size, tokenizer, pairs, f"{names} ({shards.fingerprint})", seed, dropped)


def _usable(shards: ShardSet, dropped: Counter[str]) -> Iterator[PreferencePair]:
    """Sound pairs of one prompt and two answers, all strings or all messages."""
    kind: type | None = None
    for index in range(len(shards)):
        try:
            pair = shards.pair(index)
        except RowError as error:
            dropped[error.cause] += 1
            continue
        kind = kind or type(pair.prompt)
        if pair.tools or any(isinstance(side, list) and len(side) > 1 for side in (pair.chosen, pair.rejected)):
            dropped["several_turns_or_tools"] += 1
        elif type(pair.prompt) is not kind:
            dropped["other_kind_than_first"] += 1
        else:
            yield pair


def case_of_lengths(folder: Path, size: CaseSize, name: str, seed: int) -> Case:
    """A case of random words whose lengths follow one of `LENGTH_MODELS`."""
    model_folder = folder / "model"
    model_folder.mkdir(parents=True)
    write_word_tokenizer(model_folder, size.shape.vocabulary)
    drawn = drawn_pairs(LENGTH_MODELS[name], size.max_length, size.shape.vocabulary, seed)
    pairs = list(islice(drawn, max(size.pairs, size.tokenized)))
    return _write(folder, size, _load(model_folder), pairs, f"lengths of {name}", seed, Counter())


def _load(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _write(
    folder: Path,
    size: CaseSize,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    data: str,
    seed: int,
    dropped: Counter[str],
) -> Case:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    size = replace(size, shape=replace(size.shape, vocabulary=len(tokenizer)))
    kept, tokenized = _first_sound(PairTokenizer(tokenizer, size.max_length), pairs, size.pairs, dropped)
    model_folder = folder / "model"
    write_weights(model_folder, size.shape, getattr(torch, size.dtype), size.device, seed)
    tokenizer.save_pretrained(model_folder)
    text = _lines(kept)
    (folder / "pairs.jsonl").write_text(text)
    (folder / "tokenize.jsonl").write_text(_lines(pairs[: size.tokenized]))
    ids = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in tokenized]
    case = Case(
        folder=str(folder),
        size=size,
        data=data,
        seed=seed,
        tokens={
            name: sum(len(sides[place]) for sides in ids) for place, name in enumerate(("prompt", "chosen", "rejected"))
        },
        lengths=[max(pair.sequence_lengths) for pair in tokenized],
        ids_sha256=ids_digest(ids),
        pairs_sha256=hashlib.sha256(text.encode()).hexdigest(),
        dropped=dict(dropped),
    )
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    return case


def _first_sound(
    tokenize: PairTokenizer, pairs: Sequence[PreferencePair], number: int, dropped: Counter[str]
) -> tuple[list[PreferencePair], list[TokenizedPair]]:
    kept, tokenized = [], []
    for pair, result in zip(pairs, tokenize.many(pairs, range(len(pairs))), strict=True):
        if isinstance(result, RowError):
            dropped[result.cause] += 1
        elif len(kept) < number:
            kept.append(pair)
            tokenized.append(result)
    if len(kept) < number:
        raise CaseError(f"{len(kept)} pairs can be used, but a step takes {number}: give more data or fewer --pairs")
    return kept, tokenized


def _lines(pairs: Sequence[PreferencePair]) -> str:
    rows = ({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs)
    return "".join(json.dumps(row) + "\n" for row in rows)


def ids_digest(ids: Sequence[tuple[list[int], list[int], list[int]]]) -> str:
    """Of the (prompt, chosen, rejected) token ids of all pairs, in their order."""
    return hashlib.sha256(json.dumps([list(map(list, sides)) for sides in ids]).encode()).hexdigest()


def load_case(folder: str) -> Case:
    """The case that was written into `folder`."""
    fields = json.loads((Path(folder) / "case.json").read_text())
    size = fields.pop("size")
    shape = Shape(**size.pop("shape"))
    return Case(size=CaseSize(shape=shape, **size), **fields)
