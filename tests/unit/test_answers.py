"""Answers to held-out prompts in a run: graded by the user's function, before and after, kept over a resume."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_dpo
from data_utils.schema import PairColumns, PreferencePair
from dpo.answers import pick_examples
from dpo.checker import load_checker
from dpo.config import ConfigError, parse_config
from dpo.plan import make_plan
from dpo.report.answers import answers as report_answers
from tests.tiny import tiny_model, tiny_pairs

PAIR = PreferencePair("Say A.", "A", "B", PairColumns(source="letters"), "x.jsonl:1")
CHECKS = """
def long(pair, answer): return len(answer) >= 9
def half(pair, answer): return 0.5
def broken(pair, answer): return 1 / 0
def wrong(pair, answer): return "yes"
number = 3
"""


@pytest.fixture
def checks(tmp_path: Path) -> Path:
    path = tmp_path / "my_checks.py"
    path.write_text(CHECKS)
    return path


def test_a_checker_is_found_in_a_file_or_a_module(checks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(checks.parent))
    for name in (f"{checks}:long", "my_checks:long"):
        check = load_checker(name)
        assert (check(PAIR, "123456789"), check(PAIR, "1")) == (1.0, 0.0)
    assert load_checker(f"{checks}:half")(PAIR, "") == 0.5


def test_examples_are_of_different_kinds_and_show_what_training_changed() -> None:
    kinds = ["a", "a", "b", "", "c", ""]
    assert pick_examples(kinds, [False] * 6, 4) == [0, 2, 3, 4]
    assert pick_examples(kinds, [False, True, False, False, True, True], 4) == [1, 4, 5, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("long", "write module:function"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("no/such.py:f", "no/such.py is not a file"),
        ("{checks}:nothing", "has no function 'nothing'"),
        ("{checks}:number", "has no function 'number'"),
    ],
)
def test_a_checker_that_is_not_there_is_one_line(checks: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_checker(name.format(checks=checks))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "message"), [("broken", "ZeroDivisionError"), ("wrong", "gave 'yes'")])
def test_a_checker_that_fails_names_the_row(checks: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"x.jsonl:1.*{message}|{message}.*x.jsonl:1"):
        load_checker(f"{checks}:{name}")(PAIR, "")


BASE = ["--model.path", "m", "--data.train", "t.jsonl", "--run.dir", "r"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval.generate", "true"], "eval.generate needs held-out prompts"),
        (["--eval.checker", "a:b"], "eval.checker does nothing with eval.generate=false"),
        (["--eval.temperature", "1"], "eval.temperature does nothing with eval.generate=false"),
        (["--eval.generate", "true", "--data.eval", "e.jsonl", "--eval.temperature", "-1"], "must be at least 0"),
        (["--eval.max_new_tokens", "9"], "eval.max_new_tokens does nothing with eval.generate=false"),
        (["--eval.generate", "true", "--data.eval", "e.jsonl", "--eval.num_prompts", "0"], "must be at least 1"),
    ],
)
def test_options_that_do_nothing_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config([*BASE, *flags])


def test_more_than_one_process_is_refused_in_one_line() -> None:
    config = parse_config([*BASE, "--eval.generate", "true", "--data.eval", "e.jsonl"])
    with pytest.raises(ConfigError, match=r"eval\.generate answers with one process"):
        make_plan(config, 2, 1000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a tiny model for four steps with answers; returns the run directory."""
    folder = tmp_path_factory.mktemp("answers")
    tiny_model(folder / "model")
    tiny_pairs(folder / "train.jsonl", 16)
    rows = [json.loads(line) for line in tiny_pairs(folder / "plain.jsonl", 6, seed=1).read_text().splitlines()]
    marked = [row | {"source": kind} for row, kind in zip(rows, "aabbcc", strict=True)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    (folder / "checks.py").write_text(CHECKS)

    def train(name: str, *flags: str, code: int = 0) -> Path:
        base = ["--model.path", str(folder / "model"), "--data.train", str(folder / "train.jsonl")]
        base += ["--data.eval", str(folder / "eval.jsonl"), "--batch.pairs_per_step", "4", "--log.tensorboard", "false"]
        base += ["--eval.generate", "true", "--eval.checker", f"{folder / 'checks.py'}:long"]
        base += ["--eval.max_new_tokens", "12", "--optim.learning_rate", "1e-2", "--run.dir", str(folder / name)]
        assert train_dpo.main([*base, *flags]) == code
        return folder / name

    return train


def answers(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]


def test_sampled_answers_follow_the_seed(run: Callable[..., Path]) -> None:
    def said(name: str, *flags: str) -> list[str]:
        return [row[side]["text"] for row in answers(run(name, *flags)) for side in ("before", "after")]

    hot = ["--eval.temperature", "1", "--optim.learning_rate", "1e-9"]
    once, again = said("once", *hot), said("again", *hot)
    assert once == again and once[::2] == once[1::2], "one model, one seed: the same answers before and after"
    assert said("other", *hot, "--train.seed", "7") != once != said("cold", *hot[2:])


@pytest.mark.parametrize("lora", [[], ["--lora.r", "4"]])
def test_sampled_answers_have_their_kl_to_the_reference(run: Callable[..., Path], lora: list[str]) -> None:
    directory = run(f"divergence{len(lora)}", *lora, "--eval.temperature", "1")
    summary = json.loads((directory / "summary.json").read_text())
    assert 12 * summary["answers_kl_per_token"] >= summary["answers_kl"] > summary["answers_kl_per_token"] > 1e-4
    shown = report_answers(directory)
    assert shown is not None
    assert shown["kl"] == [pytest.approx(summary[key], rel=1e-3) for key in ("answers_kl", "answers_kl_per_token")]
    other = run(f"warm{len(lora)}", *lora, "--eval.temperature", "0.5")
    assert "answers_kl" not in json.loads((other / "summary.json").read_text()), "these are no samples of the policy"


@pytest.mark.parametrize("lora", [[], ["--lora.r", "4"]])
def test_answers_before_and_after_are_graded_by_kind(run: Callable[..., Path], lora: list[str]) -> None:
    directory = run(f"graded{len(lora)}", *lora)
    rows = answers(directory)
    summary = json.loads((directory / "summary.json").read_text())
    assert [row["source"] for row in rows] == list("aabbcc")
    assert any(row["before"]["text"] != row["after"]["text"] for row in rows)
    for side in ("before", "after"):
        grades = [row[side]["grade"] for row in rows]
        assert grades == [float(len(row[side]["text"]) >= 9) for row in rows]
        assert summary[f"checker_{side}"] == {
            "all": pytest.approx(sum(grades) / 6),
            **{kind: sum(grades[2 * place : 2 * place + 2]) / 2 for place, kind in enumerate("abc")},
        }
        assert summary[f"degenerate_{side}"] == pytest.approx(sum(row[side]["degenerate"] for row in rows) / 6)


def test_before_is_the_model_without_its_adapter_also_after_a_resume(run: Callable[..., Path]) -> None:
    whole = run("whole", "--lora.r", "4")
    run("parts", "--lora.r", "4", "--train.stop_after_steps", "2", code=75)
    half_way = answers(run("parts", "--lora.r", "4", "--train.stop_after_steps", "2", code=0))
    assert half_way == [row | {"where": now["where"]} for row, now in zip(answers(whole), half_way, strict=True)]


def test_fewer_prompts_are_spread_over_the_set(run: Callable[..., Path]) -> None:
    assert [row["source"] for row in answers(run("few", "--eval.num_prompts", "3"))] == ["a", "b", "c"]


def test_without_an_evaluation_before_there_is_no_share_before(run: Callable[..., Path]) -> None:
    directory = run("after", "--eval.before", "false")
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["checker_before"] is None
    assert summary["checker_after"]["all"] is not None
    assert all(row["before"] is None for row in answers(directory))


@pytest.mark.parametrize("lora", [[], ["--lora.r", "4"]])
def test_the_last_lines_load_what_was_trained(
    run: Callable[..., Path], lora: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run(f"loaded{len(lora)}", *lora)
    lines = capsys.readouterr().out.split("to load it:\n")[1].splitlines()[:3]
    loaded: dict[str, Any] = {}
    exec(textwrap.dedent("\n".join(lines)), loaded)
    row = answers(directory)[0]
    ids = loaded["tokenizer"](row["prompt"], return_tensors="pt")["input_ids"]
    out = loaded["model"].generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    said = loaded["tokenizer"].decode(out, skip_special_tokens=True).strip()
    assert said.startswith(row["after"]["text"]), "it stops at fewer tokens: at EOS alone"


def test_the_screen_is_readable_at_80_columns(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("screen", "--eval.num_prompts", "3", "--lora.r", "4")
    screen = capsys.readouterr().out
    table = screen[screen.index("held-out pairs") : screen.index("to load it")]
    assert "pass the checker" in table
    assert "before: " in table
    assert table.count("after: ") == 3
    lines = [line for line in table.splitlines() if not line.startswith("model ")]  # that one holds a path
    assert max(map(len, lines)) <= 80
