"""The report: what it reads, how it thins and cuts, and what a real browser shows of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo.report.__main__ import main
from dpo.report.collect import collect
from dpo.report.page import as_script, write_report
from dpo.report.series import MAX_POINTS, histogram, series
from dpo.report.texts import plain, shorten
from tests.browser import Browser, find_browser
from tests.run_directory import make_run, some_texts

ESCAPE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
HOSTILE = [
    (f"1 {ESCAPE}", "<b>bold</b> & {{data}} {{script}}", "]]> --> <!-- <script>"),
    ("2 \u202eright to left\u202c \u2066isolated", "\u0000\u0007 control \u2028 \u2029", "\ufeff zero \u200b width"),
    ("3 שלום and مرحبا stay as they are", "x" * 1_000_000, "\U0001f600" * 300_000),
    ("4 half a pair \ud83d alone", "${alert(1)} `x`", "javascript:alert(1) https://example.com/"),
]


# ---- data


def test_a_thinned_curve_hides_no_spike_and_keeps_the_means() -> None:
    rows = [{"step": n + 1, "loss": 5.0 if n == 1234 else math.sin(n)} for n in range(10_000)]
    curve = series(rows)["loss"]
    assert len(curve["x"]) == MAX_POINTS and curve["x"][-1] == 10_000
    assert max(curve["high"]) == 5 and max(curve["y"]) < 1 and min(curve["low"]) == pytest.approx(-1, abs=1e-4)
    first = [row["loss"] for row in rows[:25]]
    assert (curve["low"][0], curve["y"][0]) == pytest.approx((min(first), math.fsum(first) / 25), rel=1e-4)
    few = series([{"step": 1, "loss": None, "mfu": None}, {"step": 2, "loss": 0.5, "mfu": None}])
    assert few == {"loss": {"x": [1, 2], "y": [None, 0.5]}}


def test_histograms_count_every_value_and_have_an_edge_at_zero() -> None:
    values = [-1.0, -0.5, 0.0, 0.1, 3.2]
    found = histogram([values, []])
    assert sum(found["counts"][0]) == 5 and 0.0 in found["edges"]
    assert sum(found["counts"][0][: found["edges"].index(0.0)]) == 2
    assert len(found["edges"]) == len(found["counts"][0]) + 1 and sum(found["counts"][1]) == 0
    assert histogram([[2.0, 2.0]])["counts"] == [[2]]


def test_texts_are_cut_to_one_length_that_fits() -> None:
    texts, limit = shorten([["a" * 10, "é" * 5000, "c" * 90_000], None], budget=8_000)
    assert limit is not None and texts[1] is None
    assert [len(text) for text in texts[0] or []] == [10, min(5000, limit + 1), limit + 1]
    assert sum(len(text.encode()) for text in texts[0] or []) < 8_100
    assert shorten([["short", "", "too"]]) == ([["short", "", "too"]], None)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": ["f"]}]
    assert plain(turns) == '[user]\nhi\n\n[assistant]\n["f"]'


def test_data_cannot_end_the_element_it_stands_in() -> None:
    text = as_script({"x": "</script><!-- & \u2028"})
    assert "<" not in text and "\u2028" not in text and json.loads(text) == {"x": "</script><!-- & \u2028"}


def test_a_run_is_read_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=50, texts=some_texts(30), flags={"loss.beta": 0.2})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "lo')  # torn by a crash
    found = collect(run)
    assert found["logged"] == 50 and found["training"]["loss"]["x"] == list(range(1, 51))
    assert found["changed"]["loss.beta"] == "0.2" and "optim.name" not in found["changed"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    rows = {key: (before, after) for key, _, before, after in found["before_after"]["sets"][""]["rows"]}
    assert rows["rewards/margins"] == (0, pytest.approx(last["eval_rewards/margins"], rel=1e-4))
    assert {row["name"] for row in found["groups"]["source"]} == {"chat", "code"}
    table = found["pairs"]
    margins = table["columns"]["margin"]
    assert len(margins) == 30 and math.fsum(margins) / 30 == pytest.approx(last["eval_rewards/margins"], rel=1e-4)
    assert table["texts"][7][0] == some_texts(30)[7][0] and sum(table["margins"]["counts"][0]) == 30
    assert found["reproduce"]["command"].startswith("launch/local.sh -n 2 --config")
    assert found["data"]["pairs"] == 30 and found["data"]["distinct_prompts"] == 30


def test_of_many_pairs_the_telling_ones_are_listed_and_texts_that_went_away_are_said_to(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, texts=some_texts(2500, words=5))
    (tmp_path / "run-pairs.jsonl").unlink()
    table = collect(run)["pairs"]
    assert (table["total"], len(table["columns"]["margin"])) == (2500, 2000)
    everyone = [json.loads(line) for line in (run / "eval_pairs.jsonl").read_text().splitlines()]
    worst = sorted(everyone, key=lambda row: row["after"]["rewards/margins"])[:500]
    assert {row["where"] for row in worst} <= set(table["columns"]["where"])
    assert sum(table["margins"]["counts"][0]) == 2500 and "run-pairs.jsonl" in table["missing"]


def test_a_loss_without_a_reference_has_no_drift_to_show(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, texts=some_texts(6))
    pairs = [json.loads(line) for line in (run / "eval_pairs.jsonl").read_text().splitlines()]
    for pair in pairs:
        pair |= {"reference_logps/chosen": None, "reference_logps/rejected": None, "before": None}
    (run / "eval_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: None if "drift" in key else value for key, value in row.items()} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = collect(run)
    assert not [key for key, *_ in found["before_after"]["sets"][""]["rows"] if key.startswith("drift")]
    assert found["pairs"]["columns"]["changed"] == [None] * 6 and len(found["pairs"]["columns"]["margin"]) == 6


def test_answers_before_and_after_are_graded_by_kind(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, texts=some_texts(3))

    def said(text: str, grade: float) -> dict[str, object]:
        return {"text": text, "ended": True, "degenerate": text == "", "grade": grade}

    kinds = ("caps", "caps", "json")
    rows = [
        {"where": f"x:{n}", "source": kind, "prompt": "Say it", "before": said("", 0.0), "after": said("IT", n / 2)}
        for n, kind in enumerate(kinds)
    ]
    (run / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = collect(run)["generations"]
    assert [(line["name"], line["before"], line["after"]) for line in found["groups"]] == [
        ("Answers that pass the checker", 0, 0.5),
        ("caps", 0, 0.25),
        ("json", 0, 1),
        ("Answers that are empty, cut or repeat themselves", 1, 0),
    ]
    assert found["rows"][2] == {"prompt": "Say it", "before": "", "after": "IT", "before_score": 0, "after_score": 1}


def test_the_command_writes_pages_and_refuses_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(tmp_path / f"beta-{n}", steps=9, texts=some_texts(4), flags={"loss.beta": n})) for n in (1, 2)]
    assert main([runs[0]]) == 0 and (tmp_path / "beta-1" / "report.html").is_file()
    assert main([*runs, "--page", f"{tmp_path}/both.html", "--json", f"{tmp_path}/both.json"]) == 0
    both = json.loads((tmp_path / "both.json").read_text())
    assert [run["changed"]["loss.beta"] for run in both["runs"]] == ["1", "2"]
    assert main([str(tmp_path)]) == 2
    assert main([runs[0], "--page", f"{tmp_path}/none/x.html"]) == 2
    (tmp_path / "beta-2" / "metrics.jsonl").write_text("[1}\n")
    assert main([runs[1]]) == 2
    refusals = capsys.readouterr().err.splitlines()
    assert refusals[0] == f"error: {tmp_path}: no config.yaml there; give the run.dir of a run"
    assert "name another file" in refusals[1] and "beta-2/metrics.jsonl: not what a run writes" in refusals[2]


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("no chromium or chrome on this machine")
    found = Browser(path)
    yield found
    found.close()


def test_hostile_texts_do_no_harm(tmp_path: Path, browser: Browser) -> None:
    page = write_report(make_run(tmp_path / "run<i>", steps=5, texts=HOSTILE))
    assert page.stat().st_size < 200_000
    browser.errors.clear()
    browser.requests.clear()
    browser.open(page, 1280)
    browser.run("for (const row of document.querySelectorAll('tr.row')) row.click()")
    quotes = browser.run("[...document.querySelectorAll('blockquote')].map((node) => node.textContent)")
    assert len(quotes) == 12
    shown = "\n".join(quotes)
    assert ESCAPE in shown and "{{data}} {{script}}" in shown and "שלום and مرحبا" in shown
    for invisible in ("202E", "202C", "2066", "0000", "0007", "FEFF", "200B"):
        assert f"⟨U+{invisible}⟩" in shown
    assert not re.search("[\u0000\u0007\u202e\u2066\u200b]", shown)
    assert max(map(len, quotes)) < 7_000
    assert browser.run("document.title") == "DPO: run<i>"
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img, iframe, link, a').length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= 1280
    assert browser.errors == [] and browser.requests == [page.resolve().as_uri()]
    inserted = (
        "const node = document.createElement('script'); node.text = 'document.title=1'; document.body.append(node)"
    )
    browser.run(inserted)
    assert browser.run("document.title") == "DPO: run<i>" and len(browser.errors) == 1  # the policy, at work


def test_ten_thousand_steps_and_two_thousand_pairs(tmp_path: Path, browser: Browser) -> None:
    page = write_report(make_run(tmp_path / "run", steps=10_000, texts=some_texts(2_000, words=250)))
    assert page.stat().st_size < 5_000_000
    browser.errors.clear()
    for width in (400, 1280):
        before = browser.cpu_seconds()
        browser.open(page, width)
        browser.run("document.body.offsetHeight")
        assert browser.cpu_seconds() - before < 2  # not wall-clock: the machine may do other things as well
        assert browser.run("document.documentElement.scrollWidth") <= width
        sections = browser.run("[...document.querySelectorAll('h2')].map((node) => node.textContent)")
        assert sections == [
            *("Curves", "Before and after", "Pair by pair", "Where the time went", "Training data", "Run it again"),
        ]
    assert browser.run("document.querySelectorAll('svg .line.s0').length") >= 10
    assert "each point stands for about 25" in browser.run("document.body.textContent")
    assert browser.run("document.querySelectorAll('tr.row').length") == 20
    margin = "[...document.querySelectorAll('tr.row')].map((row) => row.children[1].textContent)"
    wrong = [float(value.replace("−", "-")) for value in browser.run(margin)]
    assert wrong == sorted(wrong) and wrong[0] < -1
    browser.run(
        "[...document.querySelectorAll('button')].find((node) => node.textContent.startsWith('margin')).click()"
    )
    right = [float(value) for value in browser.run(margin)]
    assert right == sorted(right, reverse=True) and right[0] > 1
    browser.run(
        "[...document.querySelectorAll('button')].find((node) => node.textContent.startsWith('Show more')).click()"
    )
    assert browser.run("document.querySelectorAll('tr.row').length") == 120
    find = "const box = document.querySelector('input'); box.value = '1999 '; box.dispatchEvent(new Event('input'))"
    browser.run(f"{{ {find} }}")
    assert browser.run("document.querySelectorAll('tr.row').length") == 1
    assert browser.errors == []


def test_charts_answer_to_pointing_and_keys(tmp_path: Path, browser: Browser) -> None:
    page = write_report(make_run(tmp_path / "run", steps=100, texts=some_texts(20)))
    browser.open(page, 1280)
    pause = "await new Promise((done) => setTimeout(done, 100));"
    point = (
        "(async () => { const svg = document.querySelector('svg'); const box = svg.getBoundingClientRect();"
        " const at = {clientX: box.left + box.width / 2, clientY: box.top + 50};"
        " svg.dispatchEvent(new PointerEvent('pointermove', at));"
        f" {pause} return [...document.querySelectorAll('.tip')].map((node) => node.innerText); }})()"
    )
    tips = browser.run(point)
    assert len(tips) > 5 and tips[0].startswith("step ") and "training: 0." in tips[0]
    keys = (
        "(async () => { const figure = document.querySelector('figure'); figure.focus();"
        " figure.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
        f" {pause} return document.querySelector('.tip').innerText; }})()"
    )
    now, after = int(re.findall(r"\d+", tips[0])[0]), int(re.findall(r"\d+", browser.run(keys))[0])
    assert after == now + 1


def test_several_runs_are_compared_and_sorted(tmp_path: Path, browser: Browser) -> None:
    runs = [
        str(make_run(tmp_path / f"beta-{beta}", steps=9, texts=some_texts(4), flags={"loss.beta": beta}))
        for beta in (0.3, 0.1, 0.2)
    ]
    assert main([*runs, "--page", f"{tmp_path}/sweep.html"]) == 0
    browser.errors.clear()
    browser.open(tmp_path / "sweep.html", 400, dark=True)
    assert browser.run("document.documentElement.scrollWidth") <= 400
    heads = browser.run("[...document.querySelectorAll('th')].map((node) => node.textContent)")
    assert heads[1].startswith("Held-out loss") and heads[5].startswith("KL to the reference"), "results come first"
    browser.run("[...document.querySelectorAll('th button')].find((node) => node.textContent === 'loss.beta').click()")
    names = browser.run("[...document.querySelectorAll('tbody tr')].map((row) => row.children[0].textContent)")
    assert names == ["beta-0.1", "beta-0.2", "beta-0.3"]
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(13, 13, 13)"
    assert browser.errors == []
