"""Runs with a stored reference: the numbers of the live one, computed once, and never those of something else."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dpo
from data_utils.batching import collate
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from dpo import identity, reference
from dpo.engine import SingleEngine
from dpo.policy import frozen_policy
from dpo.pretrained import Pretrained
from dpo.store import SUFFIX, Store
from dpo.store_blocks import decode, encode, pair_key
from tests.tiny import CHATML, CHATML_WITH_BOS, tiny_model, tiny_pairs, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "model")
    tiny_pairs(tmp_path / "train.jsonl", 20)
    tiny_pairs(tmp_path / "eval.jsonl", 5, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    chats = [
        {key: [{"role": "user" if key == "prompt" else "assistant", "content": text}] for key, text in row.items()}
        for row in rows
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return tmp_path


def flags_of(folder: Path, flags: dict[str, str]) -> list[str]:
    common = {
        "--model.path": f"{folder}/model",
        "--data.train": f"{folder}/train.jsonl",
        "--data.eval": f"{folder}/eval.jsonl",
        "--batch.pairs_per_step": "10",
        "--optim.learning_rate": "1e-2",
        "--optim.warmup_ratio": "0",
        "--train.epochs": "2",
        "--log.every_steps": "1",
        "--log.tensorboard": "false",
        "--reference.mode": "stored",
    }
    if flags.get("--reference.mode", "stored") == "stored":
        common["--reference.store"] = f"{folder}/store"
    return [word for item in (common | flags).items() for word in item]


def train(folder: Path, name: str, **flags: str) -> list[dict[str, Any]]:
    """Train into folder/name, which must end well; the rows of metrics.jsonl. Flags with __ for the dot."""
    assert code_of(folder, name, **flags) == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def code_of(folder: Path, name: str, **flags: str) -> int:
    dotted = {f"--{key.replace('__', '.')}": value for key, value in flags.items()}
    return train_dpo.main([*flags_of(folder, dotted), "--run.dir", f"{folder}/{name}"])


def forwards(rows: list[dict[str, Any]]) -> list[int]:
    return [row["reference_forwards"] for row in rows if "loss" in row]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] if "loss" in row else row["eval_loss"] for row in rows]


def folders(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "store").iterdir() if path.is_dir())


# ---- the same numbers


def test_the_store_holds_the_live_numbers(folder: Path) -> None:
    """To 1e-6 of each log-prob, one pair at a time in padded rows, where the store was filled with packed ones."""
    assert reference.main([*flags_of(folder, {}), "--run.dir", f"{folder}/none"]) == 0
    assert not (folder / "none").exists()
    policy = frozen_policy(Pretrained.open(f"{folder}/model"), "padded", torch.float32)
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(folder / "model"), max_length=256)
    (home,) = folders(folder)
    store = Store(home)
    assert len(store) == 25
    for name in ("train.jsonl", "eval.jsonl"):
        shards = ShardSet.open([f"{folder}/{name}"])
        for index in range(len(shards)):
            pair = tokenize(shards.pair(index), index)
            with torch.no_grad():
                live_S, _ = policy(collate([pair], "padded", 0))
            assert store.look_up([pair_key(pair)])[0].tolist() == pytest.approx(live_S.tolist(), rel=1e-6)


@pytest.mark.parametrize("lora", [{}, {"lora__r": "4"}], ids=["full", "lora"])
def test_a_second_run_asks_no_reference_whatever_is_swept(
    folder: Path, lora: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = train(folder, "live", reference__mode="auto", **lora)
    cold = train(folder, "cold", **lora)
    assert losses(cold) == pytest.approx(losses(live), abs=2e-6)
    assert forwards(cold)[0] > 0 and forwards(cold)[2:] == [0, 0] and min(forwards(live)) > 0

    def never(*_: Any) -> Any:
        raise AssertionError("a second copy of the weights")

    monkeypatch.setattr(SingleEngine, "frozen_scorer", never)
    monkeypatch.setattr("dpo.build._adapter_off", never)
    warm = train(folder, "warm", **lora)
    assert losses(warm) == pytest.approx(losses(live), abs=2e-6) and forwards(warm) == [0] * 4
    sweep = {"optim__learning_rate": "1e-3", "loss__beta": "0.3", "train__seed": "7", "loss__label_smoothing": "0.1"}
    shape = {"batch__layout": "padded", "batch__pairs_per_step": "4", "batch__tokens_per_micro_batch": "100"}
    swept = train(folder, "swept", **lora, **sweep, **shape, model__attn_implementation="eager")
    assert sum(forwards(swept)) == 0 and swept[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((folder / "swept" / "summary.json").read_text())["reference_forwards"] == 0
    assert len(folders(folder)) == 1


def test_full_training_and_lora_share_one_store(folder: Path) -> None:
    train(folder, "full")
    assert sum(forwards(train(folder, "lora", lora__r="4"))) == 0


def test_only_what_is_missing_is_computed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "half.jsonl").write_text("".join(lines[:10]))
    train(folder, "half", data__train=f"{folder}/half.jsonl")
    live = train(folder, "live", reference__mode="auto")
    capsys.readouterr()
    rows = train(folder, "all")
    assert losses(rows) == pytest.approx(losses(live), abs=2e-6)
    told = [line for line in capsys.readouterr().out.splitlines() if "are not among the 15 stored" in line]
    assert len(told) == 1 and told[0].endswith("they are other pairs")
    (home,) = folders(folder)
    assert len(Store(home)) == 25


def test_a_resumed_run_holds_against_the_model_before_training(folder: Path) -> None:
    """What is missing then must not be scored by the policy, which has moved."""
    undisturbed = train(folder, "undisturbed", reference__mode="auto")
    assert code_of(folder, "stopped", train__stop_after_steps="2") == 75
    shutil.rmtree(folder / "store")
    rows = train(folder, "stopped")
    assert losses(rows) == pytest.approx(losses(undisturbed), abs=2e-6)
    assert min(forwards(rows)[2:]) > 0
    shutil.rmtree(folder / "stopped")
    assert code_of(folder, "stopped", train__stop_after_steps="2") == 75
    assert forwards(train(folder, "stopped"))[2:] == [0, 0]


def test_another_model_can_be_the_stored_reference(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(folder / "other")
    live = train(folder, "live", reference__mode="auto", reference__path=f"{folder}/other")
    argv = flags_of(folder, {"--reference.path": f"{folder}/other"})
    assert reference.main([*argv, "--run.dir", f"{folder}/none"]) == 0
    warm = train(folder, "warm", reference__path=f"{folder}/other")
    assert losses(warm) == pytest.approx(losses(live), abs=2e-6) and sum(forwards(warm)) == 0


# ---- what is stale


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("weights", "the store holds 25 pairs of other weights (sha "),
        ("config", "the store holds 25 pairs of another config.json, which is not used"),
        ("dtype", "the store holds 25 pairs of dtype float32, matmul highest, which is not used"),
        ("max_length", "those were made with max_length 256, now 9"),
        ("tokenizer", "those were made with tokenizer "),
        ("template", "those were made with chat_template "),
    ],
)
def test_stale_numbers_are_not_found_and_it_says_why(
    folder: Path, change: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"data__train": f"{folder}/chats.jsonl"}
    train(folder, "before", **flags)
    capsys.readouterr()
    if change == "weights":
        change_last_byte(folder / "model" / "model.safetensors")
    elif change == "config":
        config = json.loads((folder / "model" / "config.json").read_text())
        (folder / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    elif change == "dtype":
        flags["model__dtype"] = "bfloat16"
    elif change == "max_length":
        flags["data__max_length"] = "9"
        flags["data__train"], flags["data__on_bad_row"] = f"{folder}/train.jsonl", "skip"
        flags["data__max_bad_fraction"] = "0.9"
    elif change == "tokenizer":
        tiny_tokenizer(vocab_size=300, chat_template=CHATML).save_pretrained(folder / "model")
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        tokenizer.chat_template = CHATML_WITH_BOS
        tokenizer.save_pretrained(folder / "model")
    rows = train(folder, "after", **flags)
    assert sum(forwards(rows)) > 0
    assert why in capsys.readouterr().out


def change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_hashes_of_weights_are_remembered_until_the_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "store"
    home.mkdir(mode=0o700)
    source = Pretrained.open(f"{folder}/model")
    file = folder / "model" / "model.safetensors"
    read: list[Path] = []
    digest = identity._file_digest
    monkeypatch.setattr(identity, "_file_digest", lambda path: read.append(path) or digest(path))
    first = identity.weights_sha(source, home)
    assert identity.weights_sha(source, home) == first
    assert read == [file, file]  # so young a file could change without that its times show it
    monkeypatch.setattr(identity, "_SETTLED_S", -1.0)
    assert [identity.weights_sha(source, home) for _ in range(3)] == [first] * 3
    assert len(read) == 3
    times = file.stat()
    change_last_byte(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity.weights_sha(source, home) != first and len(read) == 4
    renamed = folder / "renamed"
    shutil.copytree(folder / "model", renamed)
    assert identity.weights_sha(Pretrained.open(str(renamed)), home) == identity.weights_sha(source, home)


# ---- what goes wrong


def falsify(home: Path, by: float) -> None:
    """Put other numbers under the same keys, in sound blocks."""
    (file,) = home.glob(f"*{SUFFIX}")
    name = home.name.encode()
    blocks = [encode(keys, logps + np.float32(by), name) for keys, logps, _ in decode(file.read_bytes(), name)]
    file.write_bytes(b"".join(blocks))


def test_wrong_numbers_in_a_store_stop_the_run_before_its_first_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(folder, "fill")
    (home,) = folders(folder)
    falsify(home, 0.5)
    assert code_of(folder, "wrong") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: step 0: policy and reference differ by ") and line.endswith(
        f"{home} is not what this model computes: remove that folder, and it is made again"
    )


def test_wrong_numbers_are_found_when_the_reference_is_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here the policy is no yardstick: another model is the reference. A missing pair brings the live one."""
    shutil.copytree(folder / "model", folder / "other")
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "half.jsonl").write_text("".join(lines[:10]))
    train(folder, "fill", data__train=f"{folder}/half.jsonl", reference__path=f"{folder}/other")
    (home,) = folders(folder)
    falsify(home, 0.5)
    assert code_of(folder, "wrong", reference__path=f"{folder}/other", data__eval=f"{folder}/train.jsonl") == 2
    assert "error: reference.store: stored log-probs are " in capsys.readouterr().err


def test_a_full_disk_costs_the_store_and_not_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    live = train(folder, "live", reference__mode="auto")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Store, "_write", full)
    capsys.readouterr()
    rows = train(folder, "full")
    assert losses(rows) == pytest.approx(losses(live), abs=2e-6)
    assert capsys.readouterr().out.count("no room left: reference log-probs are no longer stored, only used") == 1
    assert reference.main([*flags_of(folder, {}), "--run.dir", f"{folder}/none"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {folder}/store/")


def test_filling_again_computes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*flags_of(folder, {}), "--run.dir", f"{folder}/none"]
    assert reference.main(argv) == 0
    capsys.readouterr()
    assert reference.main(argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("looking up 3 steps") and out[-1].endswith("; 0 forwards")


def test_the_command_refuses_as_the_trainer_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main([*flags_of(folder, {"--data.train": f"{folder}/gone.jsonl"}), "--run.dir", "none"]) == 2
    assert f"{folder}/gone.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        reference.main(["--reference.stor", "x"])
    assert end.value.code == 2


def test_help_says_what_the_command_and_the_keys_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "python -m dpo.reference [--config FILE.yaml]" in text and "Fill the store of reference log-probs" in text
    assert "--reference.mode {auto,adapter_off,frozen_copy,stored}" in text
    assert "$XDG_CACHE_HOME/dpo/reference" in text


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_fill_that_was_killed_or_stopped_is_reused(folder: Path, number: signal.Signals, code: int) -> None:
    tiny_pairs(folder / "many.jsonl", 3000)
    flags = {"--data.train": f"{folder}/many.jsonl", "--batch.pairs_per_step": "8", "--parallel.device": "cpu"}
    command = [sys.executable, "-m", "dpo.reference", *flags_of(folder, flags), "--run.dir", f"{folder}/none"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not [path for path in (folder / "store").glob(f"*/*{SUFFIX}") if path.stat().st_size > 0]:
        assert process.poll() is None and time.monotonic() < deadline, "the fill did not get going"
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    (home,) = folders(folder)
    found = len(Store(home))
    assert found >= 256
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"{found:,} pairs in {home}; looking up 376 steps" in done.stdout
    assert f"{3005:,} pairs in {home}" in done.stdout.splitlines()[-1]
    assert sum(path.stat().st_size for path in home.glob(f"*{SUFFIX}")) <= 16 * 3005
    rows = train(folder, "after", data__train=f"{folder}/many.jsonl", batch__pairs_per_step="600", train__epochs="1")
    assert sum(forwards(rows)) == 0
