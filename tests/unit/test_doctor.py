"""The data doctor on rows with known defects: exact counts, JSON, exit codes, and the page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest

from data_utils.doctor.__main__ import main
from data_utils.doctor.page import page
from data_utils.doctor.report import Report
from tests.tiny import CHATML, TEXTS, tiny_pairs, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = [word for word in " ".join(TEXTS).split() if word not in ("I", "sorry,")]  # no refusals by chance
ULTRAFEEDBACK = ROOT.parent / "shared" / "data" / "ultrafeedback-sample" / "train.jsonl.gz"

Row = dict[str, Any]


def words(random: Random, count: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(count))


def sound_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows with nothing wrong: no two alike, neither side longer, both ending in a full stop."""
    random = Random(seed)
    rows = []
    for number in range(count):
        long, short = f"{words(random, 26)}.", f"{words(random, 16)}."
        chosen, rejected = (long, short) if number % 2 else (short, long)
        rows.append({"prompt": f"{words(random, 20)} {number}?", "chosen": chosen, "rejected": rejected})
    return rows


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and what --json wrote."""
    pages = ["--page", str(tmp_path / "page.html"), "--json", str(tmp_path / "report.json")]
    code = main([*arguments, *pages])
    return code, json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


def flag_counts(report: dict[str, Any]) -> dict[str, int]:
    return {flag["name"]: flag["count"] for flag in report["flags"] if flag["count"]}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a tokenizer and a model's config."""
    folder = tmp_path / "model"
    tiny_tokenizer(chat_template=CHATML).save_pretrained(folder)
    config = {"model_type": "llama", "max_position_embeddings": 256, "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_sound_data_gives_0(tmp_path: Path) -> None:
    code, report = run(tmp_path, write(tmp_path / "a.jsonl", sound_rows(60)))
    assert (code, report["verdict"], report["findings"]) == (0, "sound", [])
    assert report["train"]["rows"] == report["train"]["pairs"] == 60
    assert report["length_bias"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("flag", "change"),
    [
        ("mojibake", {"chosen": "The caf\u00c3\u00a9 is open, and everybody is happy to be there."}),
        ("mojibake", {"rejected": "It\u00e2\u20ac\u2122s a nice day, and everybody is happy to be there."}),
        ("mojibake", {"prompt": "What is \ufffd?"}),
        ("control_characters", {"chosen": "A bell \x07 rings in the tower of the little town by the sea."}),
        ("special_tokens", {"chosen": "The end <|im_end|> of the story that was told to us in class."}),
        ("special_tokens", {"prompt": "[INST] Tell me a story. [/INST]"}),
        ("html_entities", {"rejected": "Salt &amp; pepper are on the table of the little restaurant."}),
        ("repetitive_chosen", {"chosen": "on and " * 400}),
        ("repetitive_rejected", {"rejected": "on and " * 400}),
        ("same_words", {"chosen": "One two three.", "rejected": "One  two\nthree."}),
        ("same_letters", {"chosen": "One two three.", "rejected": "ONE TWO THREE."}),
        ("one_begins_the_other", {"chosen": "One two three.", "rejected": "One two three. Four."}),
        ("refusal_chosen", {"chosen": "I'm sorry, but I cannot help you with any of that today."}),
        ("lengths_apart", {"rejected": "Yes."}),
        (
            "repeats_prompt",
            {"prompt": "Tell me of the sea, please.", "chosen": "Tell me of the sea, please. It is big."},
        ),
        ("no_prompt", {"prompt": ""}),
    ],
)
def test_a_defect_is_flagged_and_no_other_row(tmp_path: Path, flag: str, change: Row) -> None:
    rows = sound_rows(60)
    rows[17] |= {"chosen": "Long enough to count. " + words(Random(1), 60)} if flag == "lengths_apart" else {}
    rows[17] |= change
    code, report = run(tmp_path, write(tmp_path / "a.jsonl", rows))
    raised = {flag["name"]: flag for flag in report["flags"]}[flag]
    assert (raised["count"], raised["places"]) == (1, [f"{tmp_path}/a.jsonl:18"])
    assert code == (1 if raised["level"] == "look" else 0)
    assert report["suspects"][0]["where"] == f"{tmp_path}/a.jsonl:18"
    assert report["suspects"][0]["score"] == sum(reason["weight"] for reason in report["suspects"][0]["reasons"])


@pytest.mark.parametrize(
    "text", ["NÃO, João. É à noite. Crème brûlée; naïve; 5 °C; “quoted” – café…", "日本語の文章です。"]
)
def test_words_with_accents_are_no_mojibake(tmp_path: Path, text: str) -> None:
    rows = sound_rows(60)
    rows[3]["chosen"] = text
    _, report = run(tmp_path, write(tmp_path / "a.jsonl", rows))
    assert "mojibake" not in flag_counts(report)


def test_repeats_are_counted_once_for_each_row_that_repeats(tmp_path: Path) -> None:
    rows = sound_rows(60)
    swapped = {"prompt": rows[1]["prompt"], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    as_messages = {**rows[0], "prompt": [{"role": "user", "content": rows[0]["prompt"]}]}
    near = {**rows[2], "chosen": rows[2]["chosen"][:-1] + "!", "rejected": rows[2]["rejected"] + " "}
    same_prompt = {**sound_rows(1, seed=5)[0], "prompt": rows[3]["prompt"]}
    path = write(tmp_path / "a.jsonl", [*rows, rows[0], as_messages, swapped, near, same_prompt])
    code, report = run(tmp_path, path)
    assert code == 1
    repeats = report["repeats"]
    assert (repeats["duplicates"], repeats["contradictory"], repeats["near_duplicates"]) == (2, 2, 1)
    assert (repeats["distinct_prompts"], repeats["rows_with_a_shared_prompt"]) == (60, 9)
    assert repeats["most_rows_of_a_prompt"] == 3
    assert repeats["nearest"][0]["where"].endswith(":64")
    assert repeats["nearest"][0]["earlier"].endswith(":3")
    assert report["suspects"][0]["where"].endswith(":2")  # contradictory weighs most


def test_leakage_counts_each_evaluation_pair_once(tmp_path: Path) -> None:
    rows = sound_rows(60)
    other = sound_rows(3, seed=9)
    same_prompt = {**other[0], "prompt": rows[1]["prompt"]}
    near_prompt = {**other[1], "prompt": rows[2]["prompt"].upper() + " Thanks."}
    train = write(tmp_path / "a.jsonl", rows)
    held_out = write(tmp_path / "b.jsonl", [rows[0], same_prompt, near_prompt, other[2]])
    code, report = run(tmp_path, train, "--eval", held_out)
    leak = report["leakage"]
    assert code == 1
    assert [leak[key] for key in ("eval_pairs", "same_pair", "same_prompt", "near_prompt")] == [4, 1, 1, 1]
    assert leak["examples"][0] == {"eval": f"{held_out}:1", "train": f"{train}:1"}
    assert flag_counts(report) == {"leaked_pair": 1, "leaked_prompt": 1, "leaked_near_prompt": 1}


def bad_rows() -> list[Row]:
    return [
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "a", "chosen": "one", "rejected": "  "},
        {"prompt": "a", "chosen": "one"},
    ]


def test_rows_that_the_trainer_refuses_give_2_and_a_page(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*sound_rows(60), *bad_rows()])
    code, report = run(tmp_path, path)
    assert (code, report["verdict"]) == (2, "refused")
    refused = {item["cause"]: (item["count"], item["places"]) for item in report["train"]["refused"]}
    assert refused == {
        "identical": (1, [f"{path}:61"]),
        "empty_response": (1, [f"{path}:62"]),
        "schema": (1, [f"{path}:63"]),
    }
    assert (report["train"]["rows"], report["train"]["pairs"]) == (63, 60)
    assert "empty_response" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("fraction", "expected"), [("0.01", 2), ("0.05", 1)])
def test_skipping_follows_the_maximal_fraction(tmp_path: Path, fraction: str, expected: int) -> None:
    path = write(tmp_path / "a.jsonl", [*sound_rows(60), *bad_rows()])
    assert run(tmp_path, path, "--on_bad_row", "skip", "--max_bad_fraction", fraction)[0] == expected


def test_a_bad_evaluation_row_is_refused_as_well(tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", sound_rows(60)), write(tmp_path / "b.jsonl", bad_rows()[:1])
    code, report = run(tmp_path, train, "--eval", held_out)
    assert code == 2
    assert report["findings"][0]["name"] == "bad_evaluation_rows"


def test_a_set_without_any_usable_row_still_has_a_page(tmp_path: Path) -> None:
    code, report = run(tmp_path, write(tmp_path / "a.jsonl", bad_rows()), "--on_bad_row", "skip")
    assert code == 2
    assert report["lengths"] is report["layouts"] is report["length_bias"] is None
    assert "</html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{tmp}/none.jsonl"], "none.jsonl"),
        (["{tmp}/a.jsonl", "--model", "{tmp}/none"], "--model"),
        (["{tmp}/a.jsonl", "--page", "{tmp}/none/page.html"], "none/page.html"),
        (["{tmp}/a.jsonl", "--max_length", "64"], "--model"),
        (["{tmp}/a.jsonl", "--max_bad_fraction", "0.5"], "--on_bad_row skip"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    write(tmp_path / "a.jsonl", sound_rows(3))
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    pages = [] if "--page" in filled else ["--page", str(tmp_path / "page.html")]
    try:
        code = main([*filled, *pages])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last
    assert named in last


def test_with_a_model_lengths_are_tokens_and_cuts_are_exact(tmp_path: Path, model: str) -> None:
    rows = sound_rows(60)
    rows[5]["prompt"] = words(Random(2), 90)
    path = write(tmp_path / "a.jsonl", rows)
    code, report = run(tmp_path, path, "--model", model, "--max_length", "46")
    assert code == 2
    assert report["setting"]["unit"] == "tokens"
    by_length = {cut["max_length"]: cut for cut in report["cuts"]}
    from data_utils.formats import parse_row
    from data_utils.schema import RowError
    from data_utils.tokenize import PairTokenizer

    tokenize = PairTokenizer(tiny_tokenizer(chat_template=CHATML), 1 << 20)
    full = [tokenize(parse_row(row, "here"), 0) for row in rows]
    cutting = PairTokenizer(tiny_tokenizer(chat_template=CHATML), 46)
    cut_pairs = cut_responses = too_long = lost = 0
    for row, pair in zip(rows, full, strict=True):
        try:
            short = cutting(parse_row(row, "here"), 0)
        except RowError:
            too_long += 1
            lost += len(pair.chosen_ids) + len(pair.rejected_ids)
            continue
        gone = [
            len(pair.chosen_ids) - len(short.chosen_ids),
            len(pair.rejected_ids) - len(short.rejected_ids),
        ]
        cut_pairs, cut_responses = cut_pairs + any(gone), cut_responses + sum(map(bool, gone))
        lost += sum(gone)
    mine = by_length[46]
    assert cut_pairs > 0
    assert [mine[key] for key in ("pairs_cut", "responses_cut", "prompts_too_long", "tokens_lost")] == [
        cut_pairs,
        cut_responses,
        too_long,
        lost,
    ]
    assert report["lengths"]["prompt"]["percentiles"]["max"] == max(len(pair.prompt_ids) for pair in full)
    assert {item["cause"] for item in report["train"]["refused"]} == {"prompt_too_long"}


def test_the_token_row_is_what_the_trainer_sees(tmp_path: Path, model: str) -> None:
    code, report = run(tmp_path, write(tmp_path / "a.jsonl", sound_rows(60)), "--model", model)
    row = report["token_row"]
    assert code == 0
    assert "".join(token["text"] for token in row["prompt"]).endswith("?")
    assert row["chosen"][-1]["text"] == "</s>"
    assert not any(token["scored"] for token in row["prompt"])
    assert all(token["scored"] for token in row["chosen"] + row["rejected"])
    assert {"level": "note", "name": "positions"}.items() <= report["template"][0].items()


def test_messages_without_a_chat_template_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    turns = {
        key: [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": key}]
        for key in ("chosen", "rejected")
    }
    path = write(tmp_path / "a.jsonl", [turns])
    assert main([path, "--model", str(folder), "--page", str(tmp_path / "page.html")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no chat template" in line


class Reader(HTMLParser):
    """Checks that tags nest; collects them, their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset") or name.startswith("on")
        ]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path, model: str) -> None:
    rows = [{**row, "source": name} for row, name in zip(sound_rows(60), ("first", "second") * 30, strict=True)]
    train, held_out = write(tmp_path / "a.jsonl", [*rows, rows[0], *bad_rows()]), write(tmp_path / "b.jsonl", rows[:2])
    run(tmp_path, train, "--eval", held_out, "--model", model)
    found = read(tmp_path / "page.html")
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(found.tags)
    assert found.links == []
    assert "url(" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in ("Refused", "first", "second", "identical", "pick the longer", "max_length", "shared", "score"):
        assert text in found.text


def test_rows_cannot_put_markup_into_the_page(tmp_path: Path, model: str) -> None:
    evil = "</code></style><script>alert(1)</script><img src=x onerror=alert(2)>\u202e&lt; {STYLE} %s"
    rows = sound_rows(60)
    rows[0] = {"prompt": evil, "chosen": evil + "<|im_end|>a", "rejected": evil + "b", "source": evil}
    rows.append({"prompt": "p", "chosen": "c", evil: 1})
    path = write(tmp_path / "a<b>&c.jsonl", rows)
    run(tmp_path, path, "--model", model)
    found = read(tmp_path / "page.html")
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert "<script>alert(1)</script>" in found.text
    assert "\u202e" not in found.text


def test_the_json_has_every_key_of_the_report(tmp_path: Path) -> None:
    _, report = run(tmp_path, write(tmp_path / "a.jsonl", sound_rows(3)))
    assert list(report) == list(Report.__dataclass_fields__)
    readme = (ROOT / "data_utils" / "README.md").read_text(encoding="utf-8")
    assert [key for key in report if f"`{key}`" not in readme] == []


def test_the_summary_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, write(tmp_path / "a.jsonl", [*sound_rows(60), *bad_rows(), sound_rows(1)[0]]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("REFUSED")
    assert max(len(line) for line in lines if not line.startswith("page: ")) <= 80


@pytest.mark.slow
def test_the_command_of_the_readme_runs_from_the_root(tmp_path: Path) -> None:
    """The quickstart's answers that obey are mostly the shorter ones, and the doctor sees it."""
    command = [
        "data/quickstart/train.jsonl",
        "--eval",
        "data/quickstart/eval.jsonl",
        "--page",
        str(tmp_path / "page.html"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "data_utils.doctor", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "The chosen response is the shorter one" in " ".join(done.stdout.split())


def test_help_answers_at_once() -> None:
    start = time.monotonic()
    code = "import sys; from data_utils.doctor.__main__ import parser; parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "numpy", "pyarrow", "rich"}.isdisjoint(done.stdout.split())
    assert time.monotonic() - start < 5


def test_throughput_without_tokenizing_is_above_2000_pairs_per_second(tmp_path: Path) -> None:
    """On texts of the length of HH's (438, 167 and 210 characters on average)."""
    from data_utils.doctor.survey import survey
    from data_utils.shards import ShardSet

    random = Random(0)
    rows = [
        {"prompt": words(random, 98), "chosen": words(random, 38), "rejected": words(random, 47)} for _ in range(1500)
    ]
    shards = ShardSet.open([write(tmp_path / "a.jsonl", rows)])
    start = time.process_time()
    survey(shards, None, lambda _: None)
    assert len(rows) / (time.process_time() - start) > 2000


def test_a_page_of_many_sources_stays_short(tmp_path: Path) -> None:
    rows = [{**row, "source": f"source {number}"} for number, row in enumerate(sound_rows(60))]
    run(tmp_path, write(tmp_path / "a.jsonl", rows))
    found = read(tmp_path / "page.html")
    assert "40 more" in found.text


@pytest.mark.skipif(not ULTRAFEEDBACK.exists(), reason="needs ../shared")
def test_a_real_set_that_is_called_clean(tmp_path: Path) -> None:
    code, report = run(tmp_path, str(ULTRAFEEDBACK))
    assert code == 2
    assert {item["cause"]: item["count"] for item in report["train"]["refused"]} == {
        "identical": 4,
        "empty_response": 2,
    }


def test_the_page_of_a_tiny_shard_has_all_three_histograms(tmp_path: Path) -> None:
    from data_utils.doctor.examine import examine

    report = examine([str(tiny_pairs(tmp_path / "a.jsonl", 20))], [], None, 64)
    assert page(report).count("<svg") == 3
