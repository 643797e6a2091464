"""Bad input: one line of what, where and what to do; exit code 2, before weights are read or anything is written."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_dpo
from tests.numerics import tiny_models
from tests.tiny import tiny_model, tiny_pairs, tiny_tokenizer

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
    stateful = tiny_models.tiny_model("qwen3_next", vocab_size=len(tiny_tokenizer()))
    stateful.save_pretrained(folder / "stateful")
    tiny_tokenizer().save_pretrained(folder / "stateful")
    shutil.copytree(folder / "model", folder / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    wider = shutil.copytree(folder / "model", folder / "wider") / "config.json"
    wider.write_text(json.dumps(json.loads(wider.read_text()) | {"vocab_size": 9999}))
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
    "stateful_shared": (
        ["--model.path", "{f}/stateful", "--batch.layout", "shared"],
        "batch.layout=shared: layers of {f}/stateful carry state across a row: set --batch.layout padded",
    ),
    "stateful_packed": (
        ["--model.path", "{f}/stateful", "--batch.layout", "packed"],
        "batch.layout=packed: ",
    ),
    "stateful_reference": (
        ["--reference.path", "{f}/stateful", "--batch.layout", "shared"],
        "batch.layout=shared: layers of {f}/stateful carry state",
    ),
    "attention_of_its_own": (
        ["--model.attn_implementation", "eager", "--batch.layout", "shared"],
        "batch.layout=shared brings its own attention: drop model.attn_implementation",
    ),
    "missing_file": (["--data.train", "{f}/nowhere.jsonl"], "no such data: {f}/nowhere.jsonl; "),
    "unknown_column": (["--data.train", "{f}/unknown.jsonl"], "{f}/unknown.jsonl:2: "),
    "empty_response": (["--data.train", "{f}/empty.jsonl", "--batch.pairs_per_step", "2"], "{f}/empty.jsonl:3: "),
    "missing_model": (["--model.path", "{f}/nowhere"], "model.path={f}/nowhere: "),
    "no_weights": (["--model.path", "{f}/weightless"], "model.path={f}/weightless: no *.safetensors there"),
    "adapter_on_head": (["--lora.r", "4", "--lora.target_modules", "lm_head"], "lora.target_modules: the output head "),
    "order_changed": (["--checkpoint.allow_changes", "train.seed"], "checkpoint.allow_changes: train.seed decides "),
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
    "other_vocabulary": (
        ["--reference.path", "{f}/wider", "--eval.kl", "true", "--data.eval", "{f}/pairs.jsonl"],
        "eval.kl=true: {f}/wider and {f}/model have other vocabularies: drop it",
    ),
    "unknown_flag": (["--optim.lr", "1e-5"], "unknown flag '--optim.lr': did you mean "),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    flags, start = CASES[case]
    message = refusal(folder, capsys, *[flag.format(f=folder) for flag in flags])
    assert message.startswith(start.format(f=folder)), message


def test_wandb_without_its_package_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo.session.find_spec", lambda name: None)
    assert refusal(folder, capsys, "--log.wandb", "true").startswith("log.wandb=true needs the wandb package")


def test_a_run_directory_of_another_config_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.path", f"{folder}/model", "--data.train", f"{folder}/pairs.jsonl", "--run.dir", f"{folder}/mine"]
    argv += ["--batch.pairs_per_step", "4", "--log.tensorboard", "false"]
    assert train_dpo.main([*argv, "--train.stop_after_steps", "1"]) == 75
    before = (folder / "mine" / "config.yaml").read_text()
    assert train_dpo.main([*argv, "--loss.beta", "0.3"]) == 2
    error = capsys.readouterr().err
    assert "loss.beta  0.1         0.3\n" in error
    assert f"error: run.dir={folder}/mine holds a run with another config (loss.beta: 0.1 there, 0.3 now)" in error
    assert (folder / "mine" / "config.yaml").read_text() == before
    assert train_dpo.main([*argv, "--checkpoint.resume", "never"]) == 2
    assert train_dpo.main(argv) == 0
    assert train_dpo.main(argv) == 0
    assert "this run is finished (step 5)" in capsys.readouterr().out


def test_the_command_itself_prints_no_more_than_the_line(folder: Path) -> None:
    """In a process of its own: pytest's log capture would swallow a traceback."""
    flags = ["--model.path", f"{folder}/model", "--data.train", f"{folder}/unknown.jsonl", "--run.dir", f"{folder}/run"]
    root = Path(train_dpo.__file__).parent
    command = [sys.executable, str(root / "train_dpo.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_a_run_directory_in_use_or_unusable_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a-file").write_text("")
    argv = ["--model.path", f"{folder}/model", "--data.train", f"{folder}/pairs.jsonl", "--batch.pairs_per_step", "4"]
    assert train_dpo.main([*argv, "--run.dir", f"{folder}/a-file"]) == 2
    assert capsys.readouterr().err.startswith(f"error: run.dir={folder}/a-file: ")
    (folder / "held").mkdir()
    with (folder / "held" / ".lock").open("w") as lock:
        lock.write("process 7 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train_dpo.main([*argv, "--run.dir", f"{folder}/held"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: run.dir={folder}/held is in use by process 7 on elsewhere: give another --run.dir\n"
