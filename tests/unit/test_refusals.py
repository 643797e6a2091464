"""Bad input: one line of what, where and what to do; exit code 2, before weights are read or anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_dpo
from tests.tiny import tiny_model, tiny_pairs

GOOD = {"prompt": "Say hello.", "chosen": " Hello!", "rejected": " No."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    tiny_model(folder / "model", chat_template=None)
    tiny_pairs(folder / "pairs.jsonl", 20)
    write(folder / "unknown.jsonl", [GOOD, {"prompt": "a", "chosen": "b", "reject": "c"}])
    write(folder / "empty.jsonl", [GOOD, GOOD, GOOD | {"chosen": "  "}])
    turns = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    write(folder / "messages.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}], **turns}] * 20)
    (folder / "batch.json").write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}')
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line with which the trainer refuses these flags; it must leave no run directory behind."""
    run = folder / "run"
    common = {"--model.path": f"{folder}/model", "--data.train": f"{folder}/pairs.jsonl", "--run.dir": str(run)}
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    argv = [word for item in ({"--batch.pairs_per_step": "4"} | common | given).items() for word in item]
    capsys.readouterr()
    try:
        code = train_dpo.main(argv)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert not run.exists()
    assert err.count("\n") == 1 and err.startswith("error: "), err
    return err.removeprefix("error: ").strip()


CASES = {
    "missing_file": (["--data.train", "{f}/nowhere.jsonl"], "no such data: {f}/nowhere.jsonl; "),
    "unknown_column": (["--data.train", "{f}/unknown.jsonl"], "{f}/unknown.jsonl:2: "),
    "empty_response": (["--data.train", "{f}/empty.jsonl", "--batch.pairs_per_step", "2"], "{f}/empty.jsonl:3: "),
    "missing_model": (["--model.path", "{f}/nowhere"], "model.path={f}/nowhere: "),
    "no_weights": (["--model.path", "{f}/broken"], "model.path={f}/broken: "),
    "no_gpu": (["--parallel.device", "cuda"], "parallel.device=cuda: "),
    "no_target": (["--lora.r", "4", "--lora.target_modules", "nothing"], "lora.target_modules=nothing: "),
    "pairs_per_step": (["--batch.pairs_per_step", "21"], "fewer pairs than one global step: "),
    "shard_size": (["--parallel.engine", "fsdp2", "--parallel.shard_size", "2"], "parallel.shard_size=2 "),
    "ds_batch_size": (
        ["--parallel.engine", "deepspeed", "--parallel.ds_config", "{f}/batch.json"],
        "{f}/batch.json: 'train_batch_size' belongs to the config",
    ),
    "no_chat_template": (["--data.train", "{f}/messages.jsonl"], "{f}/messages.jsonl:1: "),
    "missing_reference": (["--reference.path", "{f}/nowhere"], "reference.path={f}/nowhere: "),
    "unknown_flag": (["--optim.lr", "1e-5"], "unknown flag '--optim.lr': did you mean "),
    "no_wandb": (["--log.wandb", "true"], "log.wandb=true needs the wandb package"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    flags, start = CASES[case]
    message = refusal(folder, capsys, *[flag.format(f=folder) for flag in flags])
    assert message.startswith(start.format(f=folder)), message


def test_a_run_directory_of_another_config_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.path", f"{folder}/model", "--data.train", f"{folder}/pairs.jsonl", "--run.dir", f"{folder}/mine"]
    argv += ["--batch.pairs_per_step", "4", "--log.tensorboard", "false"]
    assert train_dpo.main([*argv, "--train.stop_after_steps", "1"]) == 75
    before = (folder / "mine" / "config.yaml").read_text()
    assert train_dpo.main([*argv, "--loss.beta", "0.3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: run.dir={folder}/mine holds a run of another config (loss.beta: 0.1 there, 0.3 now)"
    )
    assert (folder / "mine" / "config.yaml").read_text() == before
    assert train_dpo.main([*argv, "--checkpoint.resume", "never"]) == 2
    assert train_dpo.main(argv) == 0
    assert train_dpo.main(argv) == 0
    assert "this run is finished (step 5)" in capsys.readouterr().out
