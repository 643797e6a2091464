#!/usr/bin/env python
"""Pairs per CPU-second and core of `PairTokenizer.many`, beside a plain apply_chat_template loop over the same pairs.

    benchmarks/tokenize_pairs.py FILE... --model FOLDER
    benchmarks/tokenize_pairs.py FILE... --train_vocab 32000     a byte-level BPE trained on the files, ChatML

Prints one JSON line. Times are `time.process_time` in one thread; the two ways alternate, so that their ratio holds on
a busy machine, where seconds do not. Rendering, encoding and the split into prompt and responses are timed; reading
and parsing are not. The ids of the two ways are held against each other before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

from benchmarks.chat_bpe import train_bpe
from benchmarks.record import cpu_name, git
from data_utils.schema import Message, PreferencePair, RowError, TokenizedPair
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    options = _options(argv)
    shards = ShardSet.open(options.files)
    pairs, num_bad = _pairs(shards)
    if options.as_strings:
        pairs = [_as_strings(pair) for pair in pairs]
    tokenizer = _load(options.model) if options.model else train_bpe(pairs, options.train_vocab)
    tokenize = PairTokenizer(tokenizer, options.max_length)
    _require_equal(tokenize, tokenizer, pairs)
    ours, plain = _alternate(
        lambda: _in_batches(tokenize, pairs, options.batch),
        lambda: [_plain_ids(tokenizer, pair) for pair in pairs],
        options.repeats,
    )
    print(json.dumps(_record(options, shards, tokenizer, pairs, num_bad, ours, plain)))
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="+", help="shards, as for data.train")
    parser.add_argument("--model", help="folder with a tokenizer")
    parser.add_argument("--train_vocab", type=int, default=32000, help="vocabulary to train without --model")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="pairs per call, as the loader's (default 64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--as_strings", action="store_true", help="write conversations out as Human: / Assistant: text")
    return parser.parse_args(argv)


def _pairs(shards: ShardSet) -> tuple[list[PreferencePair], int]:
    pairs: list[PreferencePair] = []
    num_bad = 0
    for index in range(len(shards)):
        try:
            pairs.append(shards.pair(index))
        except RowError:
            num_bad += 1
    return pairs, num_bad


def _as_strings(pair: PreferencePair) -> PreferencePair:
    """One conversation as HH's transcripts have it."""
    if isinstance(pair.prompt, str):
        return pair
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    prompt = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in pair.prompt) + "\n\nAssistant:"
    return replace(pair, prompt=prompt, chosen=_said(pair.chosen), rejected=_said(pair.rejected))


def _said(response: str | list[Message]) -> str:
    return response if isinstance(response, str) else f" {response[-1]['content']}"


def _load(folder: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _in_batches(tokenize: PairTokenizer, pairs: list[PreferencePair], size: int) -> list[TokenizedPair | RowError]:
    starts = range(0, len(pairs), size)
    batches = (pairs[start : start + size] for start in starts)
    return [result for batch in batches for result in tokenize.many(batch, range(len(batch)))]


def _plain_ids(tokenizer: Any, pair: PreferencePair) -> list[list[int]]:
    """Prompt, prompt + chosen, prompt + rejected, each by a call of its own."""
    if isinstance(pair.prompt, str):
        texts = [pair.prompt, pair.prompt + str(pair.chosen), pair.prompt + str(pair.rejected)]
        return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    assert isinstance(pair.chosen, list) and isinstance(pair.rejected, list)
    tools = list(pair.tools) or None
    prompt = tokenizer.apply_chat_template(pair.prompt, tools=tools, add_generation_prompt=True, return_dict=False)
    both = (pair.prompt + pair.chosen, pair.prompt + pair.rejected)
    return [prompt, *(tokenizer.apply_chat_template(turns, tools=tools, return_dict=False) for turns in both)]


def _require_equal(tokenize: PairTokenizer, tokenizer: Any, pairs: list[PreferencePair]) -> None:
    """Each of our sequences is the plain one, up to its end: EOS that strings get, white space that templates add."""
    for pair, result in zip(pairs, tokenize.many(pairs, range(len(pairs))), strict=True):
        if isinstance(result, RowError):
            continue
        ours = (result.prompt_ids + result.chosen_ids, result.prompt_ids + result.rejected_ids)
        for ids, plain in zip(ours, _plain_ids(tokenizer, pair)[1:], strict=True):
            size = min(len(ids), len(plain))
            assert ids[-1] == tokenizer.eos_token_id or len(ids) >= size - 1, f"{pair.where}: a sequence is too short"
            assert ids[:size] == plain[:size], f"{pair.where}: ids differ from the tokenizer's own"


def _alternate(
    ours: Callable[[], object], plain: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """CPU-seconds of each run of both, after one of each to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for way, taken in zip((ours, plain), seconds, strict=True):
            start = time.process_time()
            way()
            taken.append(time.process_time() - start)
    return seconds[0][1:], seconds[1][1:]


def _record(
    options: argparse.Namespace,
    shards: ShardSet,
    tokenizer: Any,
    pairs: list[PreferencePair],
    num_bad: int,
    ours: list[float],
    plain: list[float],
) -> dict[str, Any]:
    import tokenizers
    import transformers

    results = PairTokenizer(tokenizer, options.max_length).many(pairs, range(len(pairs)))
    kept = [result for result in results if isinstance(result, TokenizedPair)]
    rates = sorted(len(pairs) / seconds for seconds in ours)
    return {
        "benchmark": "tokenize_pairs",
        "pairs_per_cpu_second": round(statistics.median(rates)),
        "least_and_most": [round(rates[0]), round(rates[-1])],
        "times_plain": round(statistics.median(p / o for o, p in zip(ours, plain, strict=True)), 2),
        "pairs": len(pairs),
        "bad_rows": num_bad + len(results) - len(kept),
        "tokens_per_pair": round(sum(map(_num_ids, kept)) / len(kept), 1),
        "vocabulary": len(tokenizer),
        "model": options.model or f"byte-level BPE trained on the data, ChatML, {options.train_vocab}",
        "as_strings": options.as_strings,
        "max_length": options.max_length,
        "batch": options.batch,
        "data": shards.fingerprint,
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__}
        | {"transformers": transformers.__version__},
        "commit": git("rev-parse", "HEAD"),
        "cpu": cpu_name(),
    }


def _num_ids(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


if __name__ == "__main__":
    sys.exit(main())
