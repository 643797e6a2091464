"""The trainer as a whole, in this process: what it writes, and the options that other tests do not reach."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import train_dpo
from data_utils import reader
from data_utils.manifest_command import describe
from data_utils.reader import StepReader, TokenizedStep
from dpo import advice, attention
from dpo.engine import SingleEngine, StepResult
from dpo.files import read_rows
from dpo.policy import Policy
from dpo.run import Run
from dpo.steps import AgreedStep
from tests.numerics import tiny_models
from tests.numerics.kernels import BROKEN, REFERENCE, WRONG
from tests.tiny import tiny_model, tiny_pairs, tiny_tokenizer

METRICS = (
    "step epoch loss grad_norm learning_rate rewards/chosen rewards/rejected rewards/accuracies rewards/margins "
    "logps/chosen logps/rejected pairs_seen pairs_per_second tokens_per_second padding_fraction mfu peak_memory_gib "
    "data_wait_fraction skipped_steps skipped_rows reference_forwards"
).split()
EVALUATION = (
    "step epoch eval_loss eval_rewards/chosen eval_rewards/rejected eval_rewards/accuracies eval_rewards/margins "
    "eval_logps/chosen eval_logps/rejected eval_rewards/accuracies_length_controlled eval_drift/chosen "
    "eval_drift/rejected eval_drift/chosen_fell eval_kl_per_token/chosen eval_kl_per_token/rejected eval_pairs"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_model(folder / "model")
    tiny_pairs(folder / "train.jsonl", 20)
    tiny_pairs(folder / "eval.jsonl", 5, seed=1)
    return folder


def train(folder: Path, name: str, *flags: str) -> list[dict[str, Any]]:
    """Train into folder/name, which must end well; the rows of metrics.jsonl."""
    assert code_of(folder, name, dict(zip(flags[::2], flags[1::2], strict=True))) == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def code_of(folder: Path, name: str, flags: dict[str, str], *more: str) -> int:
    """Train into folder/name; the exit code."""
    common = {
        "--model.path": f"{folder}/model",
        "--data.train": f"{folder}/train.jsonl",
        "--data.eval": f"{folder}/eval.jsonl",
        "--run.dir": f"{folder}/{name}",
        "--batch.pairs_per_step": "10",
        "--optim.learning_rate": "1e-3",
        "--optim.warmup_ratio": "0",
        "--log.every_steps": "1",
        "--log.tensorboard": "false",
    }
    return train_dpo.main([*(word for item in (common | flags).items() for word in item), *more])


@pytest.mark.parametrize(("flags", "code"), [({"--train.max_steps": "1"}, 0), ({"--data.train": "nowhere.jsonl"}, 2)])
def test_a_run_that_has_ended_is_watched_no_longer(folder: Path, flags: dict[str, str], code: int) -> None:
    before = set(threading.enumerate())
    assert code_of(folder, f"watched-{code}", flags) == code
    since = time.monotonic()
    while left := {thread for thread in set(threading.enumerate()) - before if thread.name == "watchdog"}:
        assert time.monotonic() - since < 10, left
        time.sleep(0.05)


def test_the_run_directory_holds_what_others_rely_on(folder: Path) -> None:
    rows = train(folder, "contract", "--log.tensorboard", "true", "--eval.every_steps", "1")
    assert [list(row) for row in rows] == [EVALUATION, METRICS, EVALUATION, METRICS, EVALUATION]
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    run = folder / "contract"
    assert json.loads((run / "status.json").read_text()) == {
        "state": "finished",
        "step": 2,
        "exit_code": 0,
        "reason": "",
        "attempt": 1,
    }
    summary = json.loads((run / "summary.json").read_text())
    assert {"steps": 2, "pairs": 20}.items() <= summary.items() and summary["seconds"] > 0
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["eval_accuracy_before"] == 0.5 and summary["eval_margin_before"] == pytest.approx(0, abs=1e-5)
    for key, row_key in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        assert summary[f"eval_{key}_after"] == rows[-1][f"eval_{row_key}"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["loss"]["beta"] == 0.1 and config["record"]["world_size"] == 1
    assert config["record"]["versions"]["torch"] == torch.__version__
    assert list((run / "tensorboard").iterdir()) and (run / "logs" / "rank-00000.log").is_file()


def test_a_reference_that_takes_the_policys_place_after_each_step_leaves_every_step_at_ln_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluation is against the model before training all the same."""
    flags = ("--reference.sync_steps", "1", "--reference.mixup_alpha", "1", "--train.epochs", "2")
    rows = train(folder, "hard", *flags, "--eval.every_steps", "1")
    assert "frozen_copy, every 1 steps 1 of the way to the policy" in capsys.readouterr().out
    training = [row for row in rows if "loss" in row]
    assert len(training) == 4
    assert [row["loss"] for row in training] == pytest.approx([math.log(2)] * 4, abs=1e-6)
    assert [row["rewards/margins"] for row in training] == pytest.approx([0.0] * 4, abs=1e-5)
    chosen = [row["eval_rewards/chosen"] for row in rows if "eval_loss" in row]
    assert chosen[0] == pytest.approx(0, abs=1e-6) and min(map(abs, chosen[1:])) > 1e-3


def test_the_reference_of_a_checkpoint_cannot_begin_or_cease_to_move(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moving = {"--reference.sync_steps": "1", "--reference.mixup_alpha": "0.5"}
    for name, first, later, said in (("moves", moving, {}, "moves"), ("stays", {}, moving, "does not move")):
        assert code_of(folder, name, first | {"--train.stop_after_steps": "1"}) == 75
        allowed = ["--checkpoint.allow_changes", "reference.sync_steps", "reference.mixup_alpha"]
        assert code_of(folder, name, later, *allowed) == 3
        assert f"its reference {said}: keep reference.sync_steps as it was" in capsys.readouterr().err


def test_several_evaluation_sets_have_metrics_of_their_own_and_pairs_keep_what_was_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pairs(folder / "other.jsonl", 4, seed=2)
    config = {"data": {"eval": [f"{folder}/eval.jsonl", {"path": f"{folder}/other.jsonl", "name": "mine"}]}}
    (folder / "sets.yaml").write_text(yaml.safe_dump(config))
    common = ["--model.path", f"{folder}/model", "--data.train", f"{folder}/train.jsonl", "--log.every_steps", "1"]
    common += ["--config", f"{folder}/sets.yaml", "--run.dir", f"{folder}/sets", "--batch.pairs_per_step", "10"]
    common += ["--optim.learning_rate", "1e-3", "--optim.warmup_ratio", "0"]
    assert train_dpo.main([*common, "--train.stop_after_steps", "1"]) == 75
    assert train_dpo.main(common) == 0  # resumed: what was before training is still known
    last = json.loads((folder / "sets" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["eval_pairs"], last["eval_eval_pairs"], last["eval_mine_pairs"]) == (9, 5, 4)
    parts = 5 * last["eval_eval_loss"] + 4 * last["eval_mine_loss"]
    assert last["eval_loss"] == pytest.approx(parts / 9, abs=1e-12)
    rows = read_rows(folder / "sets" / "eval_pairs.jsonl")
    assert [row["where"] for row in rows] == [f"{folder}/eval.jsonl:{n}" for n in range(1, 6)] + [
        f"{folder}/other.jsonl:{n}" for n in range(1, 5)
    ]
    assert {row["before"]["step"] for row in rows} == {0} and {row["after"]["step"] for row in rows} == {2}
    for key in ("loss", "rewards/margins", "logps/chosen"):
        mean = math.fsum(row["after"][key] for row in rows) / 9
        assert last[f"eval_{key}"] == pytest.approx(mean, rel=1e-6)
    phases = json.loads((folder / "sets" / "summary.json").read_text())["seconds_by_phase"]
    assert {"start", "training", "evaluation", "export", "waiting for data"} <= phases.keys()


def test_wandb_keeps_a_run_offline_and_goes_on_under_its_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(folder, "tracked", "--log.wandb", "true", "--log.wandb_project", "tests")
    identifier = (folder / "tracked" / "wandb_id").read_text()
    (offline,) = (folder / "tracked" / "wandb").glob("offline-run-*")
    assert offline.name.endswith(identifier) and list(offline.glob("*.wandb"))


def test_a_model_that_packing_would_get_wrong_is_trained_padded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nemotron's layers drop the documents; only the check at the start finds out. The frozen copy must follow suit."""
    tokenizer = tiny_tokenizer()
    tiny_models.tiny_model("nemotron", vocab_size=len(tokenizer)).save_pretrained(folder / "nemotron")
    tokenizer.save_pretrained(folder / "nemotron")
    rows = train(folder, "fallback", "--model.path", f"{folder}/nemotron")
    assert "layout     padded (shared and packed rows did not pass the check at the start)" in capsys.readouterr().out
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[1]["padding_fraction"] > 0
    again = train(folder, "fallback-padded", "--model.path", f"{folder}/nemotron", "--batch.layout", "padded")
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in again if "loss" in row]


def test_a_hybrid_whose_layers_carry_state_is_trained_padded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    tiny_models.tiny_model("qwen3_next", vocab_size=len(tokenizer)).save_pretrained(folder / "hybrid")
    tokenizer.save_pretrained(folder / "hybrid")
    flags = ["--model.path", f"{folder}/hybrid", "--train.max_steps", "1"]
    rows = train(folder, "hybrid-run", *flags)
    assert f"layout     padded (layers of {folder}/hybrid carry state across a row)" in capsys.readouterr().out
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_kernel_that_aligns_documents_elsewhere_gets_no_shared_rows(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows are right with it, since their documents have as many keys as queries."""
    expected = train(folder, "kernel-packed", "--batch.layout", "packed")
    monkeypatch.setitem(attention.KERNELS, "cpu", WRONG["aligned at the start"])
    rows = train(folder, "kernel")
    assert "layout     packed (shared rows did not pass the check at the start)" in capsys.readouterr().out
    assert [row["loss"] for row in rows[1:-1]] == pytest.approx([row["loss"] for row in expected[1:-1]], abs=1e-5)
    monkeypatch.setitem(attention.KERNELS, "cpu", BROKEN)
    train(folder, "kernel-broken", "--train.max_steps", "1")
    assert "layout     padded (shared and packed rows did not pass the check at the start)" in capsys.readouterr().out
    monkeypatch.setitem(attention.KERNELS, "cpu", WRONG["aligned at the start"])
    assert code_of(folder, "kernel-asked", {"--batch.layout": "shared"}) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: batch.layout=shared: this device's variable-length attention kernel is off by ")
    assert error.endswith("set --batch.layout packed\n") and error.count("\n") == 1


def test_auto_takes_shared_rows_and_one_call_for_all_documents_gives_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--lora.r", "4", "--train.gradient_checkpointing", "true"]
    expected = train(folder, "shared", *flags)
    assert "layout     shared (each prompt once, no padding)" in capsys.readouterr().out
    monkeypatch.setitem(attention.KERNELS, "cpu", REFERENCE)
    rows = train(folder, "shared-in-one-call", *flags)
    key = "eval_loss"
    assert rows[-1][key] == pytest.approx(expected[-1][key], abs=1e-6) and rows[-1][key] < 0.6931
    assert rows[1]["padding_fraction"] == 0


def test_another_reference_moves_the_start_and_offload_changes_nothing(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(folder / "other")
    live = train(folder, "other-reference", "--reference.path", f"{folder}/other")
    offloaded = train(folder, "offload", "--reference.path", f"{folder}/other", "--reference.offload", "true")
    assert abs(live[1]["loss"] - math.log(2)) > 1e-3
    assert [row.get("loss") for row in live] == [row.get("loss") for row in offloaded]


@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_lora_variants_start_at_the_reference_and_learn(folder: Path, variant: str) -> None:
    rows = train(
        folder, variant, "--lora.r", "4", f"--lora.{variant}", "true", "--train.epochs", "3", "--data.shuffle", "false"
    )
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    adapter = json.loads((folder / variant / "final" / "adapter_config.json").read_text())
    assert adapter[variant] is True


def test_bad_rows_are_skipped_and_counted_and_columns_reach_the_loss(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[3]["chosen"] = " "
    rows[4]["weight"] = 0.0
    rows[5]["margin"] = 1.0
    (folder / "columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data.on_bad_row", "skip", "--data.max_bad_fraction", "0.5", "--batch.pairs_per_step", "20"]
    (_, row, _) = train(folder, "columns", "--data.train", f"{folder}/columns.jsonl", *flags)
    assert (row["pairs_seen"], row["skipped_rows"]) == (19, 1)
    assert row["loss"] == pytest.approx(math.log(2) * 18 / 19, abs=1e-6)
    warning = (
        "warning: the rows have columns that the loss does not read; it would read margin with --loss.margin_scale 1"
    )
    assert warning in capsys.readouterr().out


def test_data_workers_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pairs(folder / "many.jsonl", 80)
    flags = ["--data.train", f"{folder}/many.jsonl", "--batch.pairs_per_step", "2"]
    alone = train(folder, "no-workers", *flags)
    made_here: list[int] = []

    def read_slowly(self: StepReader, number: int, pause: Callable[[float], object] = time.sleep) -> TokenizedStep:
        made_here.append(number)
        time.sleep(0.8)  # so that the workers, for which nothing is patched, are ready before the steps are over
        return read(self, number, pause)

    read = StepReader.read
    monkeypatch.setattr(StepReader, "read", read_slowly)
    together = train(folder, "two-workers", *flags, "--data.num_workers", "2")
    assert len(set(made_here)) < 40 - 5
    for keys in (["loss", "grad_norm", "logps/chosen"], ["eval_loss"]):
        assert [[row.get(key) for key in keys] for row in alone] == [[row.get(key) for key in keys] for row in together]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("steps", "worker"))]


def test_a_shard_removed_during_the_run_stops_it_with_a_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pairs(folder / "doomed.jsonl", 80)
    after = Run.after

    def after_removal(run: Run, step: AgreedStep, result: StepResult) -> None:
        (folder / "doomed.jsonl").unlink(missing_ok=True)
        after(run, step, result)

    monkeypatch.setattr(Run, "after", after_removal)
    monkeypatch.setattr(reader, "RETRY_PAUSES_S", (0.1, 0.1))
    flags = {"--data.train": f"{folder}/doomed.jsonl", "--batch.pairs_per_step": "2"}
    assert code_of(folder, "doomed", flags) == 2
    message = f"error: {folder}/doomed.jsonl: No such file or directory: a shard went away during the run: "
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    run = folder / "doomed"
    step = json.loads((run / "status.json").read_text())["step"]
    assert step > 0 and (run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert (run / "logs" / "rank-00000.log").read_text().count("cannot read a shard") == 1


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows[0]["weight"] = 9e29
    rows[1]["weight"] = 9e29
    (folder / "huge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data.train", f"{folder}/huge.jsonl", "--loss.beta", "100", "--data.shuffle", "false"]
    before, first, second, after = train(folder, "huge", *flags)
    assert first["grad_norm"] is None and math.isfinite(second["grad_norm"])
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 1)
    assert second["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert after["eval_loss"] != before["eval_loss"]
    assert "steps skipped so far" in capsys.readouterr().out


def test_the_ledger_names_every_pair_of_every_step(folder: Path) -> None:
    train(folder, "ledger", "--log.ledger", "true", "--train.epochs", "2", "--batch.pairs_per_step", "8")
    lines = [json.loads(line) for line in (folder / "ledger" / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(len(line) == 2 for line in lines)
    every_pair = sorted(f"{folder}/train.jsonl:{number}" for number in range(1, 21))
    for epoch in (lines[:3], lines[3:]):
        assert sorted(pair for line in epoch for pair in line["pairs"]) == every_pair
    assert [line["pairs"] for line in lines[:3]] != [line["pairs"] for line in lines[3:]]


def test_pairs_that_come_twice_are_counted_in_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "twice").mkdir()
    (folder / "twice" / "a.jsonl").write_text("".join(lines + lines[:3]))
    train(folder, "twice-live", "--data.train", f"{folder}/twice")
    describe(folder / "twice", check=True, num_workers=1)
    train(folder, "twice-manifest", "--data.train", f"{folder}/twice")
    warning = "warning: 3 of 23 pairs repeat an earlier one; see python -m data_utils.doctor"
    assert capsys.readouterr().out.count(warning) == 2


def test_more_rows_than_are_parsed_at_the_start_are_noted(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo.build.CHECKED_PER_RANK", 19)
    train(folder, "unparsed")
    assert "note: 20 rows are parsed only when they are trained on" in capsys.readouterr().out


def never(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("no reference is needed")


@pytest.mark.parametrize("lora", ["0", "4"])
@pytest.mark.parametrize("losses", ["simpo, beta: 2.0, gamma: 0.5", "sft"])
def test_without_need_of_a_reference_none_is_built_or_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lora: str, losses: str
) -> None:
    monkeypatch.setattr(SingleEngine, "frozen_scorer", never)
    monkeypatch.setattr(Policy, "adapter_off", never)
    recipe = folder / "losses.yaml"
    recipe.write_text(f"loss: {{type: {losses}}}")
    name = f"{losses.split(',')[0]}-{lora}"
    before, first_step, *_, after = train(folder, name, "--config", str(recipe), "--lora.r", lora)
    assert first_step["reference_forwards"] == 0
    assert after["eval_loss"] < before["eval_loss"]
    assert 0 < before["eval_rewards/accuracies"] < 1 and before["eval_rewards/margins"] != 0
    assert after["eval_rewards/chosen"] > before["eval_rewards/chosen"]
    if losses == "sft":
        assert before["eval_loss"] == pytest.approx(-before["eval_rewards/chosen"])


def test_losses_are_added_up_with_their_weights(folder: Path) -> None:
    """Before the first step DPO is at ln 2, so what is left is the sft term."""
    recipe = folder / "mixed.yaml"
    recipe.write_text("loss: {type: [sigmoid, sft], weights: [2.0, 0.5]}")
    before, *_ = train(folder, "mixed", "--config", str(recipe))
    (folder / "alone.yaml").write_text("loss: {type: sft}")
    alone, *_ = train(folder, "alone", "--config", str(folder / "alone.yaml"))
    assert before["eval_loss"] == pytest.approx(2 * math.log(2) + 0.5 * alone["eval_loss"], abs=1e-5)
    assert before["eval_rewards/accuracies"] == 0.5


def test_running_out_of_memory_names_the_smallest_change(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Run, "count", allocate)
    assert code_of(folder, "memory", {}) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory on cpu: weights, gradients, optimizer and reference take 0.0 GiB")
    assert "is the largest part" in error and "set --batch.tokens_per_micro_batch " in error
    assert json.loads((folder / "memory" / "status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(Run, "count", lambda *arguments: [][1])
    assert code_of(folder, "other", {}) == 1


def test_a_run_that_will_not_fit_is_told_so_at_its_start(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "SMALL", 0)
    monkeypatch.setattr(advice, "_limit", lambda world: 1.1 * 2**30)
    train(folder, "warned", "--train.max_steps", "1")
    out = capsys.readouterr().out
    assert "warning: the plan takes 1." in out and "GiB per device, of which allowance 1." in out
