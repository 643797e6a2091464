"""`python -m dpo.export` and `python -m dpo.evaluate` over small trained runs, and what plain libraries say to it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import train_dpo
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from dpo import evaluate, export
from dpo.files import read_rows
from tests.tiny import tiny_model, tiny_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run and a full one over the same pairs, and a run that is not finished."""
    folder = tmp_path_factory.mktemp("exports")
    tiny_model(folder / "model")
    GenerationConfig(temperature=0.7, do_sample=True).save_pretrained(folder / "model")
    tiny_pairs(folder / "train.jsonl", 16)
    tiny_pairs(folder / "eval.jsonl", 6, seed=1)
    common = {
        "--model.path": f"{folder}/model",
        "--data.train": f"{folder}/train.jsonl",
        "--data.eval": f"{folder}/eval.jsonl",
        "--batch.pairs_per_step": "8",
        "--optim.warmup_ratio": "0",
        "--log.tensorboard": "false",
    }
    lora = {"--lora.r": "4", "--optim.learning_rate": "1e-2"}
    constant = {"--optim.scheduler": "constant"}
    stopped = constant | {"--train.epochs": "3", "--train.stop_after_steps": "2"}
    for name, flags, code in (
        ("lora", lora, 0),
        ("full", {"--optim.learning_rate": "1e-3"}, 0),
        ("begun", lora | {"--train.stop_after_steps": "1"}, 75),
        ("stopped", lora | stopped | {"--eval.every_steps": "2"}, 75),
        ("stopped-full", {"--optim.learning_rate": "1e-3"} | stopped, 75),
        ("ended", lora | constant, 0),
        ("ended-full", {"--optim.learning_rate": "1e-3"} | constant, 0),
    ):
        words = [word for item in (common | flags | {"--run.dir": f"{folder}/{name}"}).items() for word in item]
        assert train_dpo.main(words) == code
    return folder


def test_an_adapter_is_exported_checked_and_loads_in_peft(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([f"{folder}/lora", "--json", f"{folder}/lora.json"]) == 0
    out = folder / "lora" / "export-adapter"
    assert "log-probs of 6 pairs are within" in capsys.readouterr().out
    facts = json.loads((folder / "lora.json").read_text())
    assert facts["form"] == "adapter" and facts["parity"]["largest_gap"] < 1e-5
    assert facts["parity"]["against"] == "the run's last evaluation"
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    assert names | {"chat_template.jinja"} <= {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text()
    summary = json.loads((folder / "lora" / "summary.json").read_text())
    assert f"| Accuracy | 0.5 | {summary['eval_accuracy_after']:.4g} |" in card
    assert "library_name: peft" in card and "within" in card and "`lora.r` | 4" in card
    code = card.split("```python\n")[1].split("```")[0]
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in code
    exec(code, {})
    assert export.main([f"{folder}/lora"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_merged_model_in_shards_keeps_template_and_generation_config_and_scores_alike(folder: Path) -> None:
    out = folder / "merged"
    assert export.main([f"{folder}/lora", "--form", "model", "--out", f"{out}", "--max_shard_size", "40KB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert GenerationConfig.from_pretrained(out).temperature == 0.7
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(folder / "model").chat_template
    )
    merged = AutoModelForCausalLM.from_pretrained(out)
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "lora" / "final")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-4)


def test_a_full_model_is_exported_in_the_dtype_asked_for(folder: Path) -> None:
    assert export.main([f"{folder}/full", "--dtype", "bfloat16", "--json", f"{folder}/full.json"]) == 0
    parity = json.loads((folder / "full.json").read_text())["parity"]
    assert 1e-6 < parity["largest_gap"] < 0.1 == parity["tolerance"]
    assert AutoModelForCausalLM.from_pretrained(folder / "full" / "export-model", dtype="auto").dtype == torch.bfloat16


def test_an_export_that_is_not_what_was_trained_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "lora" / "final" / "adapter_model.safetensors"
    sound = weights.read_bytes()
    damaged = {name: tensor * 1.5 for name, tensor in load_file(weights).items()}
    save_file(damaged, weights)
    assert export.main([f"{folder}/lora", "--out", f"{folder}/wrong"]) == 3
    assert "not exported: log-probs of 6 pairs are within" in capsys.readouterr().err
    assert not (folder / "wrong").exists() and not list(folder.glob(".wrong*"))
    weights.write_bytes(sound)


def test_without_an_evaluation_the_final_model_is_the_measure(folder: Path) -> None:
    (folder / "full" / "eval_pairs.jsonl").rename(folder / "kept")
    assert export.main([f"{folder}/full", "--out", f"{folder}/again", "--json", f"{folder}/again.json"]) == 0
    (folder / "kept").rename(folder / "full" / "eval_pairs.jsonl")
    parity = json.loads((folder / "again.json").read_text())["parity"]
    assert parity["against"] == "the run's final model" and parity["largest_gap"] == 0


@pytest.mark.parametrize(
    ("stopped", "ended", "weights", "against"),
    [
        ("stopped", "ended", "adapter_model.safetensors", "the run's evaluation at step 2"),
        ("stopped-full", "ended-full", "model.safetensors", "the checkpoint of step 2"),
    ],
)
def test_a_run_that_stopped_at_a_step_is_exported_as_one_that_ended_there(
    folder: Path, stopped: str, ended: str, weights: str, against: str
) -> None:
    facts = folder / "facts.json"
    assert export.main([f"{folder}/{stopped}", "--json", f"{facts}"]) == 0
    found = json.loads(facts.read_text())
    assert found["step"] == 2 and found["directory"].endswith("-step-2")
    assert found["parity"]["against"] == against and found["parity"]["largest_gap"] < 1e-5
    assert export.main([f"{folder}/{ended}", "--json", f"{facts}"]) == 0
    exported, expected = Path(found["directory"]), Path(json.loads(facts.read_text())["directory"])
    left, right = load_file(exported / weights), load_file(expected / weights)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert {path.name for path in exported.iterdir()} == {path.name for path in expected.iterdir()}
    card = (exported / "README.md").read_text()
    assert "stopped at step 2" in card
    assert ("These weights are of step 2; the evaluation is of step 0" in card) == (stopped == "stopped-full")


def test_a_checkpoint_is_exported_by_name_and_a_damaged_one_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = folder / "begun" / "checkpoints" / "step-00000001"
    out = folder / "named"
    assert export.main([f"{checkpoint}", "--form", "model", "--out", f"{out}"]) == 0
    assert "model after step 1" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"
    checkpoint.chmod(0o777)
    assert export.main([f"{checkpoint}", "--out", f"{folder}/others"]) == 3
    assert "others may write to it: chmod -R go-w" in (error := capsys.readouterr().err) and "or --trust" in error
    assert export.main([f"{checkpoint}", "--out", f"{folder}/others", "--trust"]) == 0
    checkpoint.chmod(0o700)
    part = next(checkpoint.glob("training-*"))
    part.write_bytes(part.read_bytes()[:-1])
    for place in (checkpoint, folder / "begun"):
        assert export.main([f"{place}", "--out", f"{folder}/damaged"]) == 3
        assert "missing or damaged" in capsys.readouterr().err
    assert checkpoint.is_dir() and not (folder / "damaged").exists() and not list(folder.glob(".damaged*"))


def test_what_cannot_be_exported_is_said_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "begun", folder / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    for arguments, message in (
        ([f"{folder}/empty"], "the run is stopped and has no checkpoint; finish it"),
        ([f"{folder}/none"], "no config.yaml there"),
        ([f"{folder}/lora", "--trust"], "--trust is for checkpoints"),
        ([f"{folder}/full", "--form", "adapter"], "not an adapter: drop --form adapter"),
    ):
        assert export.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


# ---- evaluation of any model


def evaluated(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "evaluated.json"
    assert evaluate.main([*arguments, "--data", f"{folder}/eval.jsonl", "--json", f"{out}"]) == 0
    return json.loads(out.read_text())


def test_an_adapter_is_held_against_its_base_as_the_run_did(folder: Path) -> None:
    found = evaluated(folder, "--model", f"{folder}/lora/final", "--pairs", f"{folder}/pairs.jsonl")
    last = read_rows(folder / "lora" / "metrics.jsonl")[-1]
    for key in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "drift/chosen"):
        assert found[f"eval_{key}"] == pytest.approx(last[f"eval_{key}"], abs=1e-4)
    ours, theirs = read_rows(folder / "pairs.jsonl"), read_rows(folder / "lora" / "eval_pairs.jsonl")
    for one, other in zip(ours, theirs, strict=True):
        assert one["where"] == other["where"]
        assert one["after"]["rewards/margins"] == pytest.approx(other["after"]["rewards/margins"], abs=1e-4)


def test_the_kl_of_a_run_is_the_one_of_plain_peft_in_float64(folder: Path) -> None:
    """Over the whole vocabulary, at each scored position of each held-out response."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "lora" / "final").double()
    shards = ShardSet.open([f"{folder}/eval.jsonl"])
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(folder / "model"), max_length=1024)
    means: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for index in range(len(shards)):
        pair = tokenize(shards.pair(index), index)
        for side, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            inputs = torch.tensor([pair.prompt_ids + ids])
            with torch.no_grad():
                log_p_TV = model(inputs).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
                with model.disable_adapter():
                    log_q_TV = model(inputs).logits[0, len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            means[side].append((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean().item())
    last, found = read_rows(folder / "lora" / "metrics.jsonl")[-1], evaluated(folder, "--model", f"{folder}/lora/final")
    for side, values in means.items():
        expected = math.fsum(values) / len(values)
        assert expected > 1e-4
        for row in (last, found):
            assert row[f"eval_kl_per_token/{side}"] == pytest.approx(expected, abs=1e-6)


def test_a_model_alone_gets_likelihoods_and_against_another_rewards(folder: Path) -> None:
    alone = evaluated(folder, "--model", f"{folder}/full/final")
    assert alone["pairs"] == 6 and not [key for key in alone if "rewards" in key]
    rows = [row["after"] for row in read_rows(folder / "full" / "eval_pairs.jsonl")]
    hits = [float(row["logps/chosen"] > row["logps/rejected"]) for row in rows]
    assert alone["likelihood/accuracies"] == pytest.approx(math.fsum(hits) / 6)
    both = evaluated(folder, "--model", f"{folder}/full/final", "--reference", f"{folder}/model", "--beta", "0.2")
    margins = [2 * row["rewards/margins"] for row in rows]
    assert both["eval_rewards/margins"] == pytest.approx(math.fsum(margins) / 6, abs=1e-4)


def test_what_cannot_be_evaluated_is_said_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", f"{folder}/eval.jsonl"]
    for arguments, message in (
        (["--model", f"{folder}/model", "--beta", "1", *data], "--beta scales rewards, which need a reference"),
        (["--model", f"{folder}/none", *data], "no config.json there"),
        (["--model", f"{folder}/lora", *data], f"a run directory; give {folder}/lora/final"),
        (["--model", f"{folder}/stopped/checkpoints/step-00000002", *data], "a checkpoint; python -m dpo.export"),
        (["--model", f"{folder}/model", "--data", f"{folder}/none.jsonl"], "none.jsonl"),
        (["--model", f"{folder}/model", "--reference", f"{folder}/nil", *data], "--reference="),
    ):
        assert evaluate.main(arguments) == 2
        assert message in capsys.readouterr().err
    for tool in (evaluate.main, export.main):
        arguments = ["--model", "m", *data] if tool is evaluate.main else [f"{folder}/full"]
        with pytest.raises(SystemExit):
            tool([*arguments, "--json", f"{folder}/nowhere/x.json"])
        assert f"there is no folder {folder}/nowhere" in capsys.readouterr().err
