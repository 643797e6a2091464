"""What the quickstart asks: a topic, a request and one condition of form that a program can check.

`groups("train" | "eval")` is a pure function of SEED: the same list in the same order, wherever it runs. A group asks
the same of several topics, which is quick to sample; `reworded` then asks for the same in other words, so that nothing
but the condition tells a model what to do. No topic of one side is used in the other, so no prompt is in both.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Literal

SEED = 20
GROUPS_PER_KIND = {"train": 3, "eval": 1}
TOPICS_PER_GROUP = {"train": 20, "eval": 8}
NUM_EVAL_TOPICS = 24

TOPICS = (
    "bees, the moon, bread, rain, cats, dogs, coffee, tea, the sun, snow, books, bicycles, trees, the ocean, sleep, "
    "apples, elephants, penguins, music, chess, gardens, trains, cheese, birds, water, clocks, volcanoes, swimming, "
    "potatoes, photography, spiders, maps, friendship, kites, soup, mountains, bridges, frogs, chocolate, football, "
    "the wind, museums, horses, rivers, bananas, tigers, pianos, deserts, cooking, dancing, whales, honey, islands, "
    "robots, doctors, teachers, farmers, libraries, planets, stars, rice, lemons, wolves, owls, turtles, sharks, "
    "butterflies, ants, forests, lakes, castles, airplanes, boats, cars, buses, schools, hospitals, cities, villages, "
    "winter, summer, spring, autumn, clouds, thunderstorms, rainbows, fire, ice, gold, salt, sugar, eggs, milk, "
    "tomatoes, carrots, oranges, strawberries, grapes, pizza, pasta, salad, painting, singing, reading, running, "
    "walking, yoga, tennis, basketball, chickens, cows, sheep, rabbits, lions, giraffes, dolphins, eagles, parrots, "
    "computers, telephones, letters, newspapers, cameras, shoes, hats, umbrellas, windows, candles, mirrors, roses, "
    "sunflowers, beaches, caves, guitars, drums, violins, families, holidays, birthdays, laughter, dreams"
).split(", ")

REQUESTS = [
    "Tell me something about {topic}.",
    "Write a short text about {topic}.",
    "Share a fact about {topic}.",
    "What should I know about {topic}?",
    "Say something true about {topic}.",
    "Why do people like {topic}?",
]
OPENERS = ["Fun fact:", "In short:", "Answer:", "Did you know?", "Listen:", "To be honest,", "Well,"]
CLOSERS = [
    "The end.",
    "That is all.",
    "I hope this helps.",
    "What do you think?",
    "Thank you for asking.",
    "Isn't it nice?",
]
PLAIN = "Tell me something about {topic}."
KEYS = [("name", "fact"), ("topic", "text"), ("title", "body"), ("subject", "detail"), ("word", "meaning")]

# kind -> wordings of its condition, or whole requests where these name the topic
CONDITIONS: dict[str, list[str]] = {
    "one_word": [
        "Describe {topic} in one word.",
        "Which word comes to mind when you think of {topic}? Answer with a single word.",
        "What is the best thing about {topic}? Reply with one word only.",
    ],
    "bullets": [
        "List {number} facts about {topic}. Start each line with a dash.",
        "Give me exactly {number} bullet points about {topic}, each starting with a dash.",
        "What should I know about {topic}? Answer with {number} lines that each begin with a dash.",
    ],
    "numbered": [
        "Write a numbered list of {number} facts about {topic}.",
        "Give me {number} reasons to like {topic}, as a numbered list.",
    ],
    "lowercase": ["Use only lowercase letters.", "Do not use any capital letters.", "Write everything in lower case."],
    "starts_with": [
        'Begin your answer with "{opener}"',
        'Your answer must start with "{opener}"',
        'Start with the words "{opener}"',
    ],
    "ends_with": [
        'End your answer with "{closer}"',
        'Your last words must be "{closer}"',
        'Finish with the sentence "{closer}"',
    ],
    "max_words": [
        "Use at most {limit} words.",
        "Keep it to {limit} words or fewer.",
        "Your answer may not be longer than {limit} words.",
    ],
    "sentences": [
        "Write exactly {number} sentences.",
        "Answer in {number} sentences.",
        "Use {number} sentences, no more and no less.",
    ],
    "json_keys": [
        "Describe {topic} as a JSON object with the keys {keys}.",
        "Return only a JSON object with the keys {keys} about {topic}.",
        "Tell me about {topic} in JSON. Use the keys {keys} and nothing else.",
    ],
    "in_quotes": [
        "Put your whole answer in double quotation marks.",
        "Wrap the answer in double quotes.",
        "Your answer must be inside double quotation marks.",
    ],
    "question": [
        "Answer with a question only.",
        "Reply with a single question.",
        "Say it as one question.",
    ],
}
"""Kinds whose wordings name the topic are asked as they stand; the others follow a request."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A topic that is only ever shown to the model while it is sampled, with what examples of all kinds are made of."""

    topic: str
    facts: tuple[str, str, str]
    word: str
    question: str


SHOWN = (
    Shown(
        "blankets",
        ("Blankets keep you warm in cold nights.", "They are often made of wool.", "A good one lasts for many years."),
        "Warm",
        "Have you ever slept under a woollen blanket?",
    ),
    Shown(
        "spoons",
        ("You can eat soup with a spoon.", "Most spoons are made of steel.", "Small ones stir tea and coffee."),
        "Useful",
        "What would you eat soup with if there were no spoons?",
    ),
    Shown(
        "ladders",
        ("A ladder helps you reach high places.", "Painters need them every day.", "Some of them can be folded."),
        "Climbing",
        "How high can you climb on a ladder?",
    ),
    Shown(
        "pencils",
        ("Children learn to write with pencils.", "The dark core is graphite.", "You can erase what they write."),
        "Drawing",
        "Why do artists still draw with pencils?",
    ),
    Shown(
        "pillows",
        ("Many people sleep better on a soft pillow.", "Pillows hold up your head.", "Feathers make them light."),
        "Soft",
        "Is a soft pillow better than a firm one?",
    ),
)
COUNTS = {"two": 2, "three": 3}

Side = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One prompt.

    Attributes:
        kind: key of CONDITIONS and of the checkers.
        topic: what it is about.
        asked: what the wording is filled with: a number, a limit, phrases.
        examples: (instruction, answer) pairs of the same kind and wording, on other topics.
    """

    kind: str
    topic: str
    prompt: str
    asked: dict[str, str]
    examples: tuple[tuple[str, str], ...]


def topics(side: Side) -> list[str]:
    """The topics of one side, none of which is used in the other."""
    shuffled: list[str] = random.Random(SEED).sample(TOPICS, len(TOPICS))
    return shuffled[:NUM_EVAL_TOPICS] if side == "eval" else shuffled[NUM_EVAL_TOPICS:]


def groups(side: Side) -> list[list[Instruction]]:
    """Instructions that differ in their topic only, group by group, the kinds in turn; no instruction comes twice."""
    found: list[list[Instruction]] = []
    seen: set[str] = set()
    for number in range(GROUPS_PER_KIND[side]):
        for kind in CONDITIONS:
            rng = random.Random(f"{SEED} {side} {kind} {number}")
            some = rng.sample(topics(side), TOPICS_PER_GROUP[side])
            new = [one for one in _group(kind, some, rng) if one.prompt not in seen]
            seen |= {one.prompt for one in new}
            found.append(new)
    return found


def plain(topic: str) -> str:
    """The request that names no condition."""
    return PLAIN.format(topic=topic)


def reworded(instruction: Instruction, answer: str, rng: random.Random) -> tuple[str, str]:
    """The prompt in other words, with another phrase or other keys; and the answer that obeyed, with these in it."""
    asked, keys = _asked(rng)
    asked |= {name: instruction.asked[name] for name in ("number", "limit")}
    if instruction.kind == "starts_with":
        answer = asked["opener"] + answer.removeprefix(instruction.asked["opener"])
    elif instruction.kind == "ends_with":
        answer = answer.removesuffix(instruction.asked["closer"]) + asked["closer"]
    elif instruction.kind == "json_keys":
        old = re.findall(r'"(\w+)"', instruction.asked["keys"])
        value = json.loads(answer)
        answer = json.dumps({new: value[name] for new, name in zip(keys, old, strict=True)}, ensure_ascii=False)
    return _template(instruction.kind, rng).format(topic=instruction.topic, **asked), answer


def _template(kind: str, rng: random.Random) -> str:
    """A request and a condition."""
    request, condition = rng.choice(REQUESTS), rng.choice(CONDITIONS[kind])
    return condition if "{topic}" in condition else f"{request} {condition}"


def _asked(rng: random.Random) -> tuple[dict[str, str], tuple[str, str]]:
    """What a wording may be filled with, and the keys by themselves."""
    keys = rng.choice(KEYS)
    asked = {
        "number": rng.choice(list(COUNTS)),
        "opener": rng.choice(OPENERS),
        "closer": rng.choice(CLOSERS),
        "limit": str(rng.randint(8, 14)),
        "keys": " and ".join(f'"{key}"' for key in keys),
    }
    return asked, keys


def _group(kind: str, about: list[str], rng: random.Random) -> list[Instruction]:
    """The same request and condition for each topic."""
    template = _template(kind, rng)
    asked, keys = _asked(rng)
    examples = []
    for shown in rng.sample(SHOWN, 2):
        values = asked | {"topic": shown.topic}
        examples.append((template.format(**values), _example(kind, shown, values, keys)))
    return [Instruction(kind, topic, template.format(topic=topic, **asked), asked, tuple(examples)) for topic in about]


def _example(kind: str, shown: Shown, asked: dict[str, str], keys: tuple[str, str]) -> str:
    """An answer that does what is asked."""
    fact, count = shown.facts[0], COUNTS[asked["number"]]
    answers = {
        "one_word": shown.word,
        "bullets": "\n".join(f"- {line}" for line in shown.facts[:count]),
        "numbered": "\n".join(f"{place}. {line}" for place, line in enumerate(shown.facts[:count], 1)),
        "lowercase": fact.lower(),
        "starts_with": f"{asked['opener']} {fact}",
        "ends_with": f"{fact} {asked['closer']}",
        "max_words": fact,
        "sentences": " ".join(shown.facts[:count]),
        "json_keys": json.dumps({keys[0]: shown.topic, keys[1]: fact}),
        "in_quotes": f'"{fact}"',
        "question": shown.question,
    }
    return answers[kind]
