"""The data doctor's arithmetic: sketches, lengths, cuts, layouts, the chat template's habits."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from data_utils.doctor import duplicates, lengths
from data_utils.doctor.texts import plain_texts
from data_utils.doctor.tokens import template_habits, token_row
from data_utils.schema import PairColumns, PreferencePair, TokenizedPair
from tests.tiny import CHATML, CHATML_WITH_BOS, PLAIN_CHAT, tiny_tokenizer


def random_words(random: Random, count: int) -> list[str]:
    return [
        "".join(random.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(random.randint(2, 9))) for _ in range(count)
    ]


def shingles(text: str) -> set[bytes]:
    content = b" " + text.encode() + bytes(8)
    return {content[start : start + 6] for start in range(len(content) - 8)}


def test_similarity_estimates_jaccard() -> None:
    random = Random(0)
    errors = []
    for _ in range(200):
        kept = random_words(random, 60)
        changed = [word if random.random() < 0.9 else random_words(random, 1)[0] for word in kept]
        a, b = " ".join(kept), " ".join(changed)
        exact = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
        both = duplicates.sketch([a, b])
        errors.append(float(duplicates.similarity(both[:1], both[1:])[0]) - exact)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.07


def test_sketches_do_not_depend_on_neighbors_case_or_white_space() -> None:
    texts = ["Some Text\n of a row", "", "x", "another one", "日本語" * 40]
    together = duplicates.sketch(texts)
    for place, text in enumerate(texts):
        assert (duplicates.sketch([text.upper().replace(" ", "  ")])[0] == together[place]).all()


def test_near_duplicates_are_found_and_others_are_not() -> None:
    """One word of 40 changed in each text: Jaccard about 0.8 to 0.9; the rest is random."""
    random = Random(1)
    originals = [random_words(random, 40) for _ in range(400)]
    copies = []
    for kept in originals[:200]:
        copy = list(kept)
        copy[random.randrange(40)] = random_words(random, 1)[0]
        copies.append(copy)
    texts = [" ".join(text) for text in originals + copies]
    sketches = duplicates.sketch(texts)
    pairs, values = duplicates.near_pairs(sketches, sketches)
    found = {(int(i), int(j)) for i, j in pairs}
    assert found <= {(i, i + 400) for i in range(200)}
    assert len(found) >= 0.95 * 200
    assert (values >= duplicates.SIMILAR).all()
    match = duplicates.near_across(sketches[:400], sketches[400:])
    assert (match == np.arange(200)).mean() >= 0.95


def test_alike_responses_to_other_prompts_are_no_near_duplicates() -> None:
    random = Random(2)
    prompts = duplicates.sketch([" ".join(random_words(random, 20)) for _ in range(2)])
    responses = duplicates.sketch(["the very same response to everything"] * 2)
    assert len(duplicates.near_pairs(responses, prompts)[0]) == 0


def test_a_large_cluster_is_found_whole() -> None:
    random = Random(3)
    base = random_words(random, 60)
    texts = [" ".join([*base, *random_words(random, 1)]) for _ in range(500)]
    sketches = duplicates.sketch(texts)
    pairs, _ = duplicates.near_pairs(sketches, sketches)
    assert (duplicates.first_of_cluster(pairs, 500) == 0).all()


def test_clusters_are_named_by_their_first_row() -> None:
    pairs = np.array([[4, 5], [1, 5], [2, 3]])
    assert duplicates.first_of_cluster(pairs, 7).tolist() == [0, 1, 2, 2, 1, 1, 6]


def test_no_rows_at_all() -> None:
    none = duplicates.sketch([])
    assert len(duplicates.near_pairs(none, none)[0]) == 0
    assert duplicates.near_across(none, duplicates.sketch(["a"])).tolist() == [-1]
    assert duplicates.near_across(duplicates.sketch(["a"]), none).tolist() == []


def test_repeats_and_contradictions() -> None:
    key = np.array([5, 7, 5, 5, 9], np.uint64)
    rows, first = duplicates.repeats(key)
    assert (rows.tolist(), first.tolist()) == ([2, 3], [0, 0])
    prompts, a, b = (np.array(values, np.uint64) for values in ([1, 1, 2, 1], [3, 4, 3, 3], [4, 3, 4, 4]))
    assert duplicates.contradictions(prompts, a, b).tolist() == [0, 1, 3]


LENGTHS = np.array([[10, 20, 30, 0], [50, 5, 5, 2], [100, 10, 10, 8], [95, 10, 10, 6]])


def test_what_a_max_length_cuts() -> None:
    cut = lengths.cut(LENGTHS, 100)
    assert (cut.pairs_cut, cut.responses_cut, cut.prompts_too_long, cut.identical) == (0, 0, 1, 1)
    assert cut.tokens_lost == 40
    assert cut.lost_fraction == 0.4
    cut = lengths.cut(LENGTHS, 35)
    assert (cut.pairs_cut, cut.responses_cut, cut.prompts_too_long, cut.tokens_lost) == (1, 1, 3, 55)


def test_the_usual_lengths_end_where_nothing_is_cut() -> None:
    assert [cut.max_length for cut in lengths.cuts(LENGTHS, 300)] == [256, 300]
    assert [cut.max_length for cut in lengths.cuts(LENGTHS, 64)] == [64, 256]


def test_layouts_by_hand() -> None:
    layouts = lengths.layouts(LENGTHS, None)
    assert layouts is not None
    assert (layouts.shared, layouts.packed, layouts.padded) == (355, 610, 2 * 4 * 110)
    assert layouts.packed_over_shared == pytest.approx(610 / 355)
    layouts = lengths.layouts(LENGTHS[:2], 35)  # the second prompt is too long; rejected is cut to 25
    assert layouts is not None
    assert (layouts.shared, layouts.packed, layouts.padded) == (55, 65, 70)
    assert lengths.layouts(LENGTHS[1:2], 35) is None


def test_histogram_holds_every_value_once() -> None:
    values = np.array([0, 1, 5, 5, 6, 7, 8, 1000])
    histogram = lengths.histogram(values)
    assert sum(histogram.counts) == len(values)
    assert len(histogram.edges) == len(histogram.counts) + 1
    bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    assert all(count == ((values >= low) & (values < high)).sum() for low, high, count in bins)


def test_percentiles_are_values_of_the_data() -> None:
    assert lengths.percentiles(np.arange(1, 101)) == lengths.Percentiles(5, 50, 95, 99, 100)


def habits(template: str | None, adds_bos: bool = False) -> dict[str, str]:
    return {
        habit.name: habit.level for habit in template_habits(tiny_tokenizer(chat_template=template, adds_bos=adds_bos))
    }


REWRITES = (
    "{% for message in messages %}{{ message.role }}: {% if loop.last or message.role == 'user' %}{{ message.content }}"
    "{% else %}...{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
DROPS_SYSTEM = CHATML.replace("in messages %}", "in messages if message.role != 'system' %}", 1)


@pytest.mark.parametrize(
    ("template", "adds_bos", "expected"),
    [
        (CHATML, False, {"bos": "fine", "end_is_not_eos": "note", "turns": "fine", "system": "fine"}),
        (CHATML_WITH_BOS, True, {"bos_twice_elsewhere": "note"}),
        ("{{ bos_token }}" + CHATML_WITH_BOS, False, {"double_bos": "look"}),
        (PLAIN_CHAT, False, {"no_end": "look"}),
        (REWRITES, False, {"rewrites_turns": "look"}),
        (CHATML.replace("assistant\n{% endif", "bot\n{% endif"), False, {"generation_prompt": "note"}),
        (NO_SYSTEM, False, {"refuses_system": "note"}),
        (DROPS_SYSTEM, False, {"drops_system": "look"}),
        ("{{ raise_exception('never') }}", False, {"refuses_conversation": "look"}),
        (None, False, {"no_template": "note"}),
    ],
)
def test_habits_of_a_chat_template(template: str | None, adds_bos: bool, expected: dict[str, str]) -> None:
    assert expected.items() <= habits(template, adds_bos).items()


def test_a_row_of_several_turns_shows_what_is_scored() -> None:
    tokenizer = tiny_tokenizer()
    ids: list[int] = tokenizer("The cat sat. Paris, of course!", add_special_tokens=False)["input_ids"]
    pair = TokenizedPair(ids[:3], ids, ids[2:], PairColumns(), "a:1", 0, ((0, 2), (4, len(ids))), None)
    row = token_row(tokenizer, pair, 1000)
    assert [token.scored for token in row.chosen] == [place not in (2, 3) for place in range(len(ids))]
    assert all(token.scored for token in row.rejected)
    assert "".join(token.text for token in row.chosen) == "The cat sat. Paris, of course!"
    assert [len(part) for part in (row.prompt, row.chosen, row.rejected)] == [3, len(ids), len(ids) - 2]
    assert [len(part) for part in (token_row(tokenizer, pair, 5).chosen, row.prompt)] == [2, 3]


def test_turns_tools_and_calls_are_read_as_text() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}]
    chosen = [call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]
    rejected = [{"role": "assistant", "content": "Four."}]
    texts = plain_texts(PreferencePair(prompt, chosen, rejected, PairColumns(), "a:1", tools=({"name": "add"},)))
    assert (texts.user, texts.rejected) == ("Add.", "Four.")
    assert texts.chosen.endswith("\n4\nFour.")
    assert '"add"' in texts.chosen
    other_tools = PreferencePair(prompt, chosen, rejected, PairColumns(), "a:1", tools=({"name": "sub"},))
    assert plain_texts(other_tools).keys[0] != texts.keys[0]
    assert plain_texts(other_tools).keys[1:] == texts.keys[1:]
