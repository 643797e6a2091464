#!/usr/bin/env python3
"""Write the quickstart's preference pairs: instructions whose fulfilment a program can check.

    python data/quickstart/make_pairs.py [FOLDER]      (default: the folder of this script)

Each pair asks for something on an everyday topic under one condition of form (the kinds of `CHECKS`). `chosen` keeps
the condition; `rejected` is as true and as fluent, and ignores it, the way a small model does. What is said comes from
knowledge.json, how it is asked from the templates below, and all choices from one seed: the same files come out, byte
for byte, wherever it runs. No topic, list, question or table row of eval.jsonl is used in train.jsonl.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 20
NUM_EVAL = {"topics": 6, "lists": 5, "questions": 6, "rows": 6}

ASKS = [
    "Tell me something about {topic}.",
    "Write one sentence about {topic}.",
    "Give me a fact about {topic}.",
    "What is worth knowing about {topic}?",
    "Share a short fact about {topic}.",
    "Say something true about {topic}.",
]
OPENERS = ["Fun fact:", "In short:", "Answer:", "Here is one:", "Good question!", "Listen:"]
CHATTER = ["", "", "", "Sure! ", "Of course. ", "Happy to help. "]
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
LETTERS = "bcdfghkmpuvwy"


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.!?]+[.!?]", text)


def is_json_object(text: str, keys: list[str]) -> bool:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and sorted(value) == sorted(keys)


def has_lines(text: str, markers: list[str]) -> bool:
    """Whether there is one line per marker, each beginning with its own and saying something."""
    lines = text.split("\n")
    return len(lines) == len(markers) and all(
        line.startswith(m) and len(line) > len(m) for line, m in zip(lines, markers, strict=True)
    )


# kind -> whether a response keeps the condition, given what the prompt asked for
CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "one_word": lambda text, _: len(words(text)) == 1,
    "bullets": lambda text, n: has_lines(text, ["- "] * n),
    "numbered": lambda text, n: has_lines(text, [f"{i}. " for i in range(1, n + 1)]),
    "all_caps": lambda text, _: text.isupper(),
    "lowercase": lambda text, _: text.islower(),
    "ends_with": lambda text, word: words(text)[-1] == word,
    "starts_with": lambda text, opener: text.startswith(opener),
    "max_words": lambda text, n: len(words(text)) <= n,
    "sentences": lambda text, n: len(sentences(text)) == n,
    "json_keys": is_json_object,
    "without_letter": lambda text, letter: letter not in text.lower(),
}


@dataclass(frozen=True)
class Pair:
    """One pair, and what its prompt asked for as `CHECKS[kind]` takes it."""

    kind: str
    asked: Any
    prompt: str
    chosen: str
    rejected: str

    def check(self) -> None:
        keeps = CHECKS[self.kind]
        assert keeps(self.chosen, self.asked), f"chosen breaks {self.kind}: {self}"
        assert not keeps(self.rejected, self.asked), f"rejected keeps {self.kind}: {self}"

    def row(self) -> dict[str, object]:
        return {
            "prompt": [{"role": "user", "content": self.prompt}],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "source": self.kind,
        }


class Writer:
    """Makes pairs of every kind out of pieces of knowledge, with one source of chance."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def ask(self, topic: str, *conditions: str) -> str:
        """The question and one wording of the condition, in either order."""
        parts = [self.rng.choice(ASKS).format(topic=topic), self.rng.choice(conditions)]
        if self.rng.random() < 0.25:
            parts.reverse()
        return " ".join(parts)

    def chatty(self, text: str) -> str:
        return self.rng.choice(CHATTER) + text

    def all_caps(self, topic: str, facts: list[str]) -> Pair:
        chosen, other = self.rng.sample(facts, 2)
        prompt = self.ask(topic, "Write in all capital letters.", "Use capital letters only.", "Answer in ALL CAPS.")
        rejected = self.rng.choice([chosen, other, other.replace(words(other)[1], words(other)[1].upper(), 1)])
        return Pair("all_caps", None, prompt, chosen.upper(), self.chatty(rejected))

    def lowercase(self, topic: str, facts: list[str]) -> Pair:
        chosen, other = self.rng.sample(facts, 2)
        prompt = self.ask(
            topic, "Use only lowercase letters.", "Do not use any capital letters.", "Write everything in lower case."
        )
        rejected = self.rng.choice([self.chatty(chosen), self.chatty(other), other.title()])
        return Pair("lowercase", None, prompt, chosen.lower(), rejected)

    def ends_with(self, topic: str, facts: list[str]) -> Pair:
        chosen = self.rng.choice(facts)
        word = words(chosen)[-1]
        other = self.rng.choice([fact for fact in facts if words(fact)[-1] != word])
        conditions = (
            f'End with the word "{word}".',
            f'The last word must be "{word}".',
            f'Finish on the word "{word}".',
        )
        return Pair("ends_with", word, self.ask(topic, *conditions), chosen, self.chatty(other))

    def starts_with(self, topic: str, facts: list[str]) -> Pair:
        opener, wrong = self.rng.sample(OPENERS, 2)
        chosen, other = self.rng.sample(facts, 2)
        prompt = self.ask(
            topic,
            f'Begin with "{opener}"',
            f'Your answer must start with "{opener}"',
            f'Start your reply with "{opener}"',
        )
        rejected = self.rng.choice([self.chatty(other), self.chatty(chosen), f"{wrong} {other}"])
        return Pair("starts_with", opener, prompt, f"{opener} {chosen}", rejected)

    def max_words(self, topic: str, facts: list[str]) -> Pair:
        chosen, first, second = self.rng.sample(facts, 3)
        limit = max(len(words(chosen)), 6) + self.rng.randrange(2)
        rejected = f"{first} {second}"
        prompt = self.ask(
            topic,
            f"Use at most {limit} words.",
            f"Keep it to {limit} words or fewer.",
            f"Your answer may not be longer than {limit} words.",
        )
        return Pair("max_words", limit, prompt, chosen, self.chatty(rejected))

    def sentences(self, topic: str, facts: list[str]) -> Pair:
        count = self.rng.choice([2, 2, 3])
        wrong = self.rng.choice([n for n in (1, 2, 3, 4) if n != count])
        number = NUMBER_WORDS[count]
        prompt = self.rng.choice(
            [
                f"Describe {topic} in exactly {number} sentences.",
                f"Write exactly {number} sentences about {topic}.",
                f"What should I know about {topic}? Answer in {number} sentences, no more and no less.",
            ]
        )
        chosen, rejected = (" ".join(self.rng.sample(facts, n)) for n in (count, wrong))
        return Pair("sentences", count, prompt, chosen, rejected)

    def without_letter(self, topic: str, facts: list[str]) -> Pair:
        def split(letter: str) -> tuple[list[str], list[str]]:
            free = [fact for fact in facts if letter not in fact.lower()]
            return free, [fact for fact in facts if fact not in free]

        letter = self.rng.choice([c for c in LETTERS if all(split(c)) and c not in topic.lower()])
        free, bound = split(letter)
        prompt = self.ask(
            topic,
            f'Do not use the letter "{letter}".',
            f'Avoid the letter "{letter}" completely.',
            f'The letter "{letter}" must not appear in your answer.',
        )
        return Pair("without_letter", letter, prompt, self.rng.choice(free), self.chatty(self.rng.choice(bound)))

    def bullets(self, name: str, items: list[str], count: int) -> Pair:
        number, chosen = NUMBER_WORDS[count], self.rng.sample(items, count)
        prompt = self.rng.choice(
            [
                f"Name some {name}. Answer with exactly {number} bullet points, each starting with a dash.",
                f'Give me exactly {number} {name} as a list with "- " before each one.',
                f"I need {number} {name}, one per line, each line starting with a dash.",
            ]
        )
        prose = f"{', '.join(chosen[:-1])} and {chosen[-1]}."
        too_many = "\n".join(f"- {item}" for item in items)
        numbered = "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1))
        rejected = self.rng.choice([f"Some {name} are: {prose}", too_many, numbered])
        return Pair("bullets", count, prompt, "\n".join(f"- {item}" for item in chosen), rejected)

    def numbered(self, name: str, items: list[str], count: int) -> Pair:
        number, chosen = NUMBER_WORDS[count], self.rng.sample(items, count)
        prompt = self.rng.choice(
            [
                f"List {number} {name} as a numbered list.",
                f"Give me a numbered list from 1 to {count} of {name}.",
                f"Write down {number} {name}. Number the lines 1 to {count}.",
            ]
        )
        prose = f"Here are {number} {name}: {', '.join(chosen)}."
        dashes = "\n".join(f"- {item}" for item in chosen)
        rejected = self.rng.choice([prose, dashes, f"Some {name}:\n{dashes}"])
        return Pair("numbered", count, prompt, "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1)), rejected)

    def one_word(self, question: str, word: str, long_answer: str) -> Pair:
        prompt = self.rng.choice(
            [
                f"{question} Answer with one word.",
                f"{question} Reply with a single word only.",
                f"Answer in exactly one word: {question}",
                f"{question} One word, please.",
            ]
        )
        return Pair("one_word", None, prompt, word + self.rng.choice(["", "."]), self.chatty(long_answer))

    def json_keys(self, table: dict[str, Any], row: list[str], keys: list[str]) -> Pair:
        values = dict(zip(table["keys"], row, strict=True))
        about = table["about"].format(**values)
        named = " and ".join(f'"{key}"' for key in keys)
        prompt = self.rng.choice(
            [
                f"Describe {about} as a JSON object with exactly the keys {named}.",
                f"Return only a JSON object with the keys {named} for {about}.",
                f"Tell me about {about} in JSON. The keys must be {named}.",
            ]
        )
        prose = table["prose"].format(**values)
        bare = ", ".join(f"{key}: {values[key]}" for key in keys)
        rejected = self.rng.choice([prose, prose, bare, json.dumps({"answer": prose})])
        return Pair("json_keys", keys, prompt, json.dumps({key: values[key] for key in keys}), rejected)


def topic_pairs(writer: Writer, topics: list[tuple[str, list[str]]]) -> Iterator[Pair]:
    kinds = (
        writer.all_caps,
        writer.lowercase,
        writer.ends_with,
        writer.starts_with,
        writer.max_words,
        writer.sentences,
    )
    for topic, facts in topics:
        for make in (*kinds, writer.without_letter):
            yield make(topic, facts)


def table_rows(knowledge: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    return [(table, row) for table in knowledge["tables"] for row in table["rows"]]


def split(knowledge: dict[str, Any], rng: random.Random) -> dict[str, tuple[list[Any], list[Any]]]:
    """Every piece of knowledge on one side: name -> (train, eval)."""
    pieces = {
        "topics": list(knowledge["topics"].items()),
        "lists": list(knowledge["lists"].items()),
        "questions": list(knowledge["questions"]),
        "rows": table_rows(knowledge),
    }
    for items in pieces.values():
        rng.shuffle(items)
    return {name: (items[NUM_EVAL[name] :], items[: NUM_EVAL[name]]) for name, items in pieces.items()}


def make_pairs(pieces: dict[str, list[Any]], rng: random.Random) -> list[Pair]:
    """All pairs of one side, checked, in random order."""
    writer = Writer(rng)
    pairs = list(topic_pairs(writer, pieces["topics"]))
    for name, items in pieces["lists"]:
        pairs += [writer.bullets(name, items, rng.choice([3, 4])), writer.numbered(name, items, rng.choice([3, 4]))]
    pairs += [writer.one_word(*question) for question in pieces["questions"]]
    for table, row in pieces["rows"]:
        keys = [table["keys"][0], rng.choice(table["keys"][1:])]
        pairs.append(writer.json_keys(table, row, keys))
    for pair in pairs:
        pair.check()
    rng.shuffle(pairs)
    return pairs


def main(argv: list[str]) -> None:
    folder = Path(argv[0]) if argv else HERE
    rng = random.Random(SEED)
    sides = split(json.loads((HERE / "knowledge.json").read_text(encoding="utf-8")), rng)
    for side, name in enumerate(("train", "eval")):
        pairs = make_pairs({piece: both[side] for piece, both in sides.items()}, rng)
        text = "".join(json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}.jsonl: {len(pairs)} pairs")


if __name__ == "__main__":
    main(sys.argv[1:])
