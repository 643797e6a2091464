"""benchmarks/quickstart.py: the record of several seeds, table and plot; and that README.md shows what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.quickstart import main
from dpo.config import parse_config, to_yaml

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "benchmarks/records").glob("*-quickstart.json"))


def finished_run(folder: Path, seed: int, obeying: float, *flags: str) -> Path:
    """A run directory as a finished run leaves it, as far as the record reads it."""
    folder.mkdir()
    recipe = ["--config", str(ROOT / "launch/recipes/quickstart.yaml"), "--run.dir", str(folder)]
    config = parse_config([*recipe, "--train.seed", str(seed), *flags])
    (folder / "config.yaml").write_text(to_yaml(config, {"git_commit": "abc", "versions": {"torch": "9.9"}}))
    summary: dict[str, Any] = {"checker_before": {"one_word": 0.0, "all": 0.25}, "seconds": 60.0}
    summary |= {"checker_after": {"one_word": 0.5, "all": obeying}, "degenerate_before": 0.5, "degenerate_after": 0.1}
    for key, before, after in (("accuracy", 0.5, 0.75), ("margin", 0, 2), ("chosen_drift", 0, 0.5)):
        summary |= {f"eval_{key}_before": before, f"eval_{key}_after": after}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_record_of_two_seeds_has_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(finished_run(tmp_path / f"seed-{seed}", seed, 0.6 + seed / 10)) for seed in (0, 1)]
    assert main([*runs, "--record", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| seeds 0, 1 | before | after | least to most |\n|")
    assert "| answers that do as they are told | 25 % | 65 % | 60 % to 70 % |\n" in printed
    (path,) = tmp_path.glob("*-quickstart.json")
    record = json.loads(path.read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    assert record["git_commit"] == "abc"
    assert str(tmp_path) not in path.read_text()
    assert main(["--table", str(path)]) == 0
    assert capsys.readouterr().out == printed
    texts = [element.text for element in ElementTree.parse(path.with_suffix(".svg")).iter() if element.text]
    assert {"all", "one word", "before", "after", "65%", "50%"} <= set(texts)


def test_one_seed_has_no_least_and_no_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(finished_run(tmp_path / "seed-3", 3, 0.6))]) == 0
    head, _, first, *_ = capsys.readouterr().out.splitlines()
    assert head == "| seed 3 | before | after |"
    assert first == "| answers that do as they are told | 25 % | 60 % |"


def test_what_is_no_set_of_finished_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(finished_run(tmp_path / "first", 0, 0.6))
    other = str(finished_run(tmp_path / "other", 1, 0.6, "--loss.beta", "0.2"))
    unfinished = finished_run(tmp_path / "unfinished", 1, 0.6)
    (unfinished / "summary.json").unlink()
    for arguments, said in (
        ([first, other], "differ in more than seed and run.dir"),
        ([first, str(unfinished)], "has no checker_after"),
        (["--table", str(tmp_path / "none.json")], "is no record of the quickstart"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_readme_shows_the_record_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert main(["--table", str(RECORDS[-1])]) == 0
    assert capsys.readouterr().out in readme
    assert f"benchmarks/records/{RECORDS[-1].stem}.svg" in readme
