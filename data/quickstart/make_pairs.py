#!/usr/bin/env python3
"""Make the quickstart's pairs: SmolLM2-135M-Instruct answers, a program picks what does as it was told and what not.

    python data/quickstart/make_pairs.py [--out FOLDER] [--samples FILE] [--only_pick]

`chosen` was said after two worked examples on other topics, which the model imitates, and does what the instruction
asks; `rejected` was said about the same topic under this or another condition, or without any, and does not. Both are
the model's own words; the pair holds the instruction alone, without the examples. Without them the model seldom does
as it is asked.

Sampling takes some minutes of one CPU core. Stopped or killed, the same command goes on: answers are kept, batch by
batch, in the file of --samples. The seeds are fixed; another machine or version rounds differently and gives other
texts, so the files that ship are the ones to compare with. --only_pick makes them again from the kept answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from checkers import CHECKERS, words  # noqa: E402
from instructions import SEED, Instruction, Side, groups, plain, reworded, topics  # noqa: E402

MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
SAMPLES = ROOT / ".cache" / "quickstart-samples.jsonl"
SIDES: tuple[Side, ...] = ("eval", "train")
MAX_TOKENS = 64
NUM_PAIRS = {"train": 2, "eval": 1}
"""Pairs per instruction at most, with no rejected answer twice."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model answers at a time.

    Attributes:
        prompts: names of what is answered, in the file of answers.
        conversations: what the model is given for each.
    """

    prompts: list[str]
    conversations: list[list[dict[str, str]]]
    num_samples: int
    temperature: float
    max_new_tokens: int


def batches() -> Iterator[Batch]:
    """Everything there is to answer: topics without a condition, then instructions after their examples."""
    for side in SIDES:
        prompts = [plain(topic) for topic in topics(side)]
        for first in range(0, len(prompts), 40):
            some = prompts[first : first + 40]
            yield Batch(some, [[turn("user", prompt)] for prompt in some], NUM_PAIRS[side], 0.8, MAX_TOKENS)
        for group in groups(side):
            yield Batch([one.prompt for one in group], [shown(one) for one in group], 2, 0.6, 48)


def turn(role: str, text: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": text}


def shown(instruction: Instruction) -> list[dict[str, str]]:
    """The conversation in which an instruction comes after its examples."""
    turns = [(turn("user", asked), turn("assistant", said)) for asked, said in instruction.examples]
    return [*chain(*turns), turn("user", instruction.prompt)]


def sample(file: Path) -> None:
    """Answer everything that the file has no answers to, with a progress bar."""
    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo.generate import Decoding, answer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    stop_ids = frozenset([tokenizer.eos_token_id])
    done = kept(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    left = [(number, batch) for number, batch in enumerate(batches()) if batch.prompts[-1] not in done]
    for number, batch in track(left, "sampling"):
        texts = tokenizer.apply_chat_template(batch.conversations, tokenize=False, add_generation_prompt=True)
        decoding = Decoding(batch.max_new_tokens, stop_ids, batch.temperature, batch.num_samples, SEED + number)
        answers = answer(model, tokenizer(texts)["input_ids"], decoding, torch.device("cpu"))
        with open(file, "a", encoding="utf-8") as out:
            for prompt, mine in zip(batch.prompts, answers, strict=True):
                said = [{"text": tokenizer.decode(one.ids).strip(), "ended": one.ended} for one in mine]
                out.write(json.dumps({"prompt": prompt, "answers": said}, ensure_ascii=False) + "\n")


def kept(file: Path) -> dict[str, list[dict[str, Any]]]:
    """prompt -> its answers; a line that a killed process left torn is not counted."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["prompt"]] = row["answers"]
    return found


def is_repetitive(text: str) -> bool:
    """Whether three words in a row come twice."""
    seen = words(text.lower())
    triples = list(zip(seen, seen[1:], seen[2:], strict=False))
    return len(set(triples)) < len(triples)


def good_answers(instruction: Instruction, answers: list[dict[str, Any]], common: set[str]) -> list[str]:
    """Answers that do what is asked, name the topic, repeat nothing and are no example's; none twice."""
    stem = re.sub(r"(ies|es|s)$", "", instruction.topic.split()[-1])
    examples = {said for _, said in instruction.examples}
    found = []
    for answer in answers:
        text = answer["text"]
        fits = text.strip(".").lower() in common if instruction.kind == "one_word" else stem in text.lower()
        sound = answer["ended"] and fits and not is_repetitive(text) and text not in examples
        if sound and CHECKERS[instruction.kind](instruction.prompt, text):
            found.append(text)
    return list(dict.fromkeys(found))


def bad_answers(instruction: Instruction, answers: list[dict[str, Any]]) -> list[str]:
    """Answers that do not do what is asked; those that were cut, up to their last whole sentence."""
    found = []
    for answer in sorted(answers, key=lambda answer: not answer["ended"]):
        text = answer["text"] if answer["ended"] else re.sub(r"(?s)(.*[.!?])[^.!?]*", r"\1", answer["text"])
        if len(words(text)) >= 2 and not CHECKERS[instruction.kind](instruction.prompt, text):
            found.append(text)
    return list(dict.fromkeys(found))


def common_words(answers: dict[str, list[dict[str, Any]]]) -> set[str]:
    """Words that two of all answers hold: the model makes up words, but not the same ones."""
    texts = [answer["text"] for mine in answers.values() for answer in mine]
    counts = Counter(word for text in texts for word in set(words(text.lower())))
    return {word for word, count in counts.items() if count >= 2}


def pick(file: Path, side: Side) -> list[dict[str, Any]]:
    """The pairs of one side, in random order."""
    answers, per_kind = kept(file), Counter[str]()
    common, rng = common_words(answers), random.Random(SEED)
    about: dict[str, list[Instruction]] = {}
    for one in (one for group in groups(side) for one in group):
        about.setdefault(one.topic, []).append(one)
    pairs = []
    for instruction in (one for group in groups(side) for one in group):
        good = good_answers(instruction, answers.get(instruction.prompt, []), common)
        # First what was said about the topic under another condition: as short as chosen, so that style tells nothing.
        others = [answer for one in about[instruction.topic] for answer in answers.get(one.prompt, [])]
        rng.shuffle(others)
        bad = bad_answers(instruction, others)[:1] + bad_answers(instruction, answers.get(plain(instruction.topic), []))
        num_pairs = min(NUM_PAIRS[side], len(bad)) if good else 0
        pairs += [pair_row(instruction, good[place % len(good)], bad[place]) for place in range(num_pairs)]
        per_kind[instruction.kind] += num_pairs
    rng.shuffle(pairs)
    print(f"{side}: {len(pairs)} pairs; " + ", ".join(f"{kind} {count}" for kind, count in per_kind.items()))
    return pairs


def pair_row(instruction: Instruction, chosen: str, rejected: str) -> dict[str, Any]:
    """A row of the file, its prompt in words drawn for this pair under which `rejected` still does not obey."""
    rng = random.Random(f"{SEED} {instruction.prompt} {chosen} {rejected}")
    while True:
        prompt, answer = reworded(instruction, chosen, rng)
        if not CHECKERS[instruction.kind](prompt, rejected):
            break
    return {
        "prompt": [turn("user", prompt)],
        "chosen": [turn("assistant", answer)],
        "rejected": [turn("assistant", rejected)],
        "source": instruction.kind,
    }


def main(argv: list[str] | None = None) -> None:
    """Sample what is missing, then write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of train.jsonl and eval.jsonl")
    parser.add_argument("--samples", type=Path, default=SAMPLES, help="file of the model's answers, kept between calls")
    parser.add_argument("--only_pick", action="store_true", help="write the pairs of the answers that are there")
    options = parser.parse_args(argv)
    if not options.only_pick:
        sample(options.samples)
    for side in SIDES:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pick(options.samples, side))
        (options.out / f"{side}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
