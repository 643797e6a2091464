from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.config import (
    Config,
    ConfigError,
    DataSource,
    changed_keys,
    load_record,
    parse_config,
    parse_or_exit,
    to_dict,
    to_yaml,
)
from dpo.config_text import known_keys

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ["--model.path", "m", "--data.train", "d.jsonl", "--run.dir", "r"]


def parse(*flags: str) -> Config:
    return parse_config([*REQUIRED, *flags])


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_are_those_of_the_design() -> None:
    config = parse()
    assert (config.loss.type, config.loss.beta, config.data.max_length) == (("sigmoid",), 0.1, 1024)
    assert (config.batch.pairs_per_step, config.batch.tokens_per_micro_batch, config.batch.layout) == (64, 8192, "auto")
    assert (config.optim.learning_rate, config.optim.warmup_ratio, config.train.seed) == (1e-6, 0.1, 42)
    assert (config.parallel.device, config.model.dtype) == ("auto", "auto")
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (0, None, ("all-linear",))


def test_lora_sets_its_own_learning_rate() -> None:
    config = parse("--lora.r", "8")
    assert (config.optim.learning_rate, config.lora.alpha) == (1e-5, None)
    config = parse("--lora.r", "8", "--lora.alpha", "4", "--optim.learning_rate", "2e-6")
    assert (config.optim.learning_rate, config.lora.alpha) == (2e-6, 4)


@pytest.mark.parametrize(
    ("flags", "source"),
    [
        ((), "frozen_copy"),
        (("--lora.r", "8"), "adapter_off"),
        (("--lora.r", "8", "--reference.path", "m2"), "frozen_copy"),
        (("--reference.mode", "stored"), "frozen_copy"),
        (("--lora.r", "8", "--reference.mode", "stored"), "adapter_off"),
        (("--lora.r", "8", "--reference.mode", "stored", "--reference.path", "m2"), "frozen_copy"),
        (("--lora.r", "8", "--reference.mode", "frozen_copy", "--reference.offload", "true"), "frozen_copy"),
    ],
)
def test_auto_reference_is_the_adapter_switched_off_where_it_can_be(flags: tuple[str, ...], source: str) -> None:
    assert parse(*flags).reference_source == source


def test_flags_win_over_the_file_and_the_file_over_defaults(recipe: Any) -> None:
    path = recipe("model: {path: from_file}\nloss: {beta: 0.3}\ntrain: {epochs: 2}\n")
    config = parse_config(["--config", path, "--data.train", "a", "b", "--run.dir=r", "--loss.beta=0.5"])
    assert (config.model.path, config.loss.beta, config.train.epochs) == ("from_file", 0.5, 2)
    assert config.data.train == ("a", "b")


def test_the_last_flag_of_a_scalar_counts_and_a_repeated_list_is_refused() -> None:
    assert parse("--loss.beta", "0.2", "--loss.beta", "0.3").loss.beta == 0.3
    assert "given twice: list all its values after one flag" in refusal(*REQUIRED, "--data.train", "e.jsonl")


@pytest.mark.parametrize(("text", "value"), [("true", True), ("TRUE", True), ("False", False)])
def test_booleans_are_true_or_false_in_any_case(text: str, value: bool, recipe: Any) -> None:
    assert parse("--data.shuffle", text).data.shuffle is value
    assert parse("--config", recipe(f"data:\n  shuffle: {text}\n")).data.shuffle is value


def test_yaml_numbers_are_read_as_flags_are(recipe: Any) -> None:
    config = parse("--config", recipe("optim: {learning_rate: 1e-5}\ntrain: {seed: 010, max_steps: null}\n"))
    assert (config.optim.learning_rate, config.train.seed, config.train.max_steps) == (1e-5, 10, None)


def test_yaml_sources_may_have_a_name_and_lists_may_be_one_value(recipe: Any) -> None:
    path = recipe("data:\n  train: [a.jsonl, {path: b/*.parquet, name: helpful}]\n  eval: e.jsonl\n")
    config = parse_config(["--config", path, "--model.path", "m", "--run.dir", "r"])
    assert config.data.train == ("a.jsonl", DataSource("b/*.parquet", "helpful"))
    assert config.data.eval == ("e.jsonl",)


def test_the_rank_that_the_deepspeed_launcher_adds_is_ignored() -> None:
    assert parse("--local_rank=1") == parse()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--optim.lr", "1"], "unknown flag '--optim.lr': did you mean '--optim.learning_rate'?"),
        (["--loss.betta", "1"], "unknown flag '--loss.betta': did you mean '--loss.beta'?"),
        (["--data.max-length", "9"], "did you mean '--data.max_length'?"),
        (["--max_steps", "3"], "did you mean '--train.max_steps'?"),
        (["--num_train_epochs", "3"], "did you mean '--train.epochs'?"),
        (["--model.quantized", "nf4"], "unknown flag '--model.quantized': did you mean '--model.quantization'?"),
        (["stray"], "unexpected argument 'stray'"),
        (["--data.shuffle", "on"], "--data.shuffle: expected true or false, found 'on'"),
        (["--train.seed", "9" * 400, *REQUIRED], "train.seed must be in [0, 2**32)"),
        (["--train.seed", "1.5"], "--train.seed: expected a whole number, found '1.5'"),
        (["--loss.beta", "nan"], "--loss.beta: expected a number, found 'nan'"),
        (["--loss.type", "ppo"], "--loss.type: expected sigmoid or robust or hinge or ipo "),
        (["--model.dtype", "fp16"], "--model.dtype: expected auto or bfloat16 or float32, found 'fp16'"),
        (["--train.seed", "1", "2"], "--train.seed: expected one value, found '1' '2'"),
        (["--train.seed"], "--train.seed: expected one value, found none"),
        (["--config", "nope.yaml"], "--config nope.yaml: No such file or directory"),
        (["--config"], "--config: expected one file, found none"),
        (["--print-config", "x"], "--print-config takes no value, found x"),
        (["--model.path", "m", "--run.dir", "r"], "--data.train is missing"),
        (["--data.train", "d", "--run.dir", "r"], "--model.path is missing"),
        (["--data.train", "d", "--model.path", "m"], "--run.dir is missing"),
    ],
)
def test_flags_that_cannot_be_read_are_refused_in_one_line(flags: list[str], expected: str) -> None:
    assert expected in refusal(*flags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lr: 1}", "unknown key 'optim.lr' in r.yaml: did you mean 'optim.learning_rate'?"),
        ("optimizer: {lr: 1}", "r.yaml: unknown section 'optimizer': did you mean 'optim'?"),
        ("data: {shuffle: yes}", "data.shuffle in r.yaml: expected true or false, found 'yes'"),
        ("loss: {beta: [1, 2]}", "loss.beta in r.yaml: expected a number, found a list"),
        ("model: {path: {a: b}}", "model.path in r.yaml: expected text, found a mapping"),
        ("loss: 3", "section 'loss' in r.yaml: expected keys below it, found '3'"),
        ("- a\n- b", "r.yaml: expected sections such as 'model:', found a list"),
        ("loss:\n  beta: 1\n  beta: 2", "r.yaml:3: key 'beta' is given twice: keep one"),
        ("loss:\n  beta: 1\nloss:\n  beta: 2", "r.yaml:3: key 'loss' is given twice: keep one"),
        ("loss:\n  beta: [1", "r.yaml:2: malformed YAML"),
        ("loss:\n\tbeta: 1", "r.yaml:2: malformed YAML"),
        ("? [a]\n: b", "r.yaml:1: malformed YAML: found unhashable key"),
        ("data: {train: [{path: a, weight: 0}]}", "weight of a source must be above 0"),
        ("data: {train: [{path: a, nam: b}]}", "data.train in r.yaml: unknown key 'nam': did you mean 'name'?"),
        ("data: {train: [{name: b}]}", "data.train in r.yaml: a source needs a path, found name"),
        ("data: {train: ''}", "data.train is empty"),
        ("data: {train: ['']}", "data.train and data.eval must not hold an empty path"),
        ("data: {train: [[a]]}", "data.train in r.yaml: expected text, found a list"),
        ("data: {train: &a [*a]}", "r.yaml:1: malformed YAML"),
    ],
)
def test_yaml_that_cannot_be_read_is_refused_in_one_line(recipe: Any, text: str, expected: str) -> None:
    path = recipe(text)
    message = refusal("--config", path, "--model.path", "m", "--run.dir", "r").replace(path, "r.yaml")
    assert expected in message


def test_yaml_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"loss: \xff")
    assert "not UTF-8 text" in refusal("--config", str(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_bytes(b"loss: \x00")
    assert "malformed YAML" in refusal("--config", str(tmp_path / "r.yaml"))
    assert "Is a directory" in refusal("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--model.path=", "model.path is empty"),
        ("--run.dir=", "run.dir is empty"),
        ("--loss.beta 0", "loss.beta must be above 0, not 0.0: set --loss.beta"),
        ("--loss.label_smoothing 0.5", "loss.label_smoothing must be in [0, 0.5), not 0.5"),
        ("--data.max_length 1", "data.max_length must be at least 2, not 1"),
        ("--data.num_workers -1", "data.num_workers must be at least 0, not -1"),
        ("--data.max_bad_fraction 0.5", "does nothing with data.on_bad_row=error: set --data.on_bad_row skip"),
        ("--loss.type", "loss.type is empty: set --loss.type sigmoid"),
        ("--loss.type sigmoid sigmoid", "loss.type=sigmoid sigmoid names a loss twice: drop one"),
        ("--loss.type sigmoid sft --loss.weights 1", "loss.weights: 1 for the 2 of loss.type: give one each, or none"),
        ("--loss.type sigmoid sft --loss.weights 1 0", "each of loss.weights must be above 0, not 0.0"),
        ("--loss.type exo_pair", "loss.type=exo_pair needs labels that are not sure: set --loss.label_smoothing"),
        ("--loss.type sft --loss.beta 0.3", "loss.beta does nothing with loss.type=sft: set --loss.type sigmoid"),
        (
            "--loss.type bco_pair_no_shift sft --loss.gamma 1",
            "loss.gamma does nothing with loss.type=bco",
        ),
        ("--loss.discopop_tau 1", "loss.discopop_tau does nothing with loss.type=sigmoid: set --loss.type discopop"),
        ("--loss.type simpo --loss.f_divergence forward_kl", "loss.f_divergence does nothing with loss.type=simpo"),
        ("--loss.f_alpha_divergence_coef 0.3", "does nothing with loss.f_divergence=reverse_kl: set --loss.f_div"),
        ("--loss.beta_momentum 0.5", "loss.beta_momentum does nothing with loss.beta_gain=0 and loss.beta_filter=0"),
        ("--loss.beta_filter 1", "loss.beta_filter must be in [0, 1), not 1.0"),
        ("--loss.type aot hinge --loss.beta_filter 0.2", "loss.beta_filter leaves pairs out, which aot sorts"),
        ("--loss.type simpo --loss.beta_filter 0.2", "loss.beta_filter does nothing with loss.type=simpo"),
        ("--loss.type aot --loss.wpo true", "loss.wpo does nothing with loss.type=aot: set --loss.type sigmoid"),
        ("--loss.type aot hinge --loss.wpo true", "loss.wpo weighs pairs, which aot sorts: drop one of them"),
        ("--loss.type aot --loss.gamma 1", "loss.gamma does nothing with loss.type=aot: set --loss.type sigmoid"),
        ("--loss.type sigmoid sft --loss.ld_alpha 0.5", "loss.ld_alpha weighs tokens, but sft takes all alike"),
        ("--loss.ld_alpha 1.5", "loss.ld_alpha must be in [0, 1], not 1.5"),
        ("--loss.ld_alpha 0.5 --reference.mode stored", "reference.mode=stored keeps sums over whole responses"),
        ("--loss.type simpo --reference.path m2", "reference.path does nothing with loss.type=simpo, which needs no"),
        ("--loss.type sft --reference.mode stored", "reference.mode does nothing with loss.type=sft, which needs no"),
        ("--batch.pairs_per_step 0", "batch.pairs_per_step must be at least 1, not 0"),
        ("--eval.kl true", "eval.kl needs held-out pairs: set --data.eval"),
        ("--eval.kl true --data.eval e --loss.type simpo", "eval.kl=true: loss.type=simpo has no reference: drop it"),
        ("--eval.kl true --data.eval e --reference.sync_steps 9", "eval.kl=true: reference.sync_steps moves the ref"),
        ("--eval.kl true --data.eval e --reference.mode stored", "a stored reference has log-probs only: set --ref"),
        ("--lora.dropout 0.1", "lora.dropout does nothing with lora.r=0 (full fine-tuning): set --lora.r 16"),
        ("--lora.use_dora true", "lora.use_dora does nothing with lora.r=0"),
        ("--lora.r 8 --lora.target_modules all-linear q_proj", "all-linear covers every linear layer"),
        ("--lora.r 8 --lora.target_modules", "lora.target_modules is empty"),
        ("--reference.mode adapter_off", "reference.mode=adapter_off needs an adapter, but lora.r=0"),
        ("--lora.r 8 --reference.mode adapter_off --reference.path x", "reference.path does nothing with reference"),
        ("--lora.r 8 --reference.offload true", "reference.offload does nothing when the adapter is switched off"),
        ("--reference.mixup_alpha 0.5", "reference.mixup_alpha does nothing with no reference.sync_steps: set --ref"),
        ("--reference.sync_steps 0", "reference.sync_steps must be at least 1, not 0"),
        ("--reference.sync_steps 2 --reference.mixup_alpha 0", "reference.mixup_alpha must be in (0, 1], not 0.0"),
        (
            "--reference.sync_steps 2 --reference.mode stored",
            "moves a copy of the model, which reference.mode=stored does not keep: set --reference.mode frozen_copy",
        ),
        (
            "--reference.sync_steps 2 --lora.r 8 --reference.mode adapter_off",
            "moves a copy of the model, which reference.mode=adapter_off does not keep",
        ),
        (
            "--reference.sync_steps 2 --lora.r 8 --reference.mode frozen_copy",
            "reference.sync_steps moves whole weights, but lora.r=8 trains an adapter beside them: set --lora.r 0",
        ),
        ("--reference.sync_steps 2 --loss.type simpo", "reference.sync_steps does nothing with loss.type=simpo"),
        ("--reference.store s", "reference.store does nothing with reference.mode=auto: set --reference.mode stored"),
        (
            "--lora.r 8 --reference.mode stored --reference.offload true",
            "reference.offload does nothing when the adapter is switched off",
        ),
        ("--parallel.engine deepspeed", "needs --parallel.ds_config: ds_configs/zero1.json, zero2.json or zero3.json"),
        ("--parallel.ds_config x.json", "parallel.ds_config does nothing with parallel.engine=auto: set --parallel.en"),
        ("--parallel.engine single --parallel.shard_size 1", "parallel.shard_size does nothing with parallel.engine"),
        ("--parallel.shard_size 0", "parallel.shard_size must be at least 1"),
        ("--optim.learning_rate 0", "optim.learning_rate must be above 0"),
        ("--optim.warmup_ratio 1", "optim.warmup_ratio must be in [0, 1)"),
        ("--optim.max_grad_norm -1", "optim.max_grad_norm must be at least 0, not -1.0"),
        ("--train.max_steps 0", "train.max_steps must be at least 1"),
        ("--train.seed -1", "train.seed must be in [0, 2**32), not -1"),
        ("--checkpoint.allow_changes optim.learning_rte", "did you mean 'optim.learning_rate'?"),
        ("--log.wandb_project p", "log.wandb_project does nothing with log.wandb=false: set --log.wandb true"),
        ("--eval.every_steps 5", "eval.every_steps needs held-out pairs: set --data.eval"),
        ("--export.merge_lora true", "export.merge_lora does nothing with lora.r=0: set --lora.r 16"),
    ],
)
def test_what_cannot_work_or_would_be_ignored_is_refused(flags: str, expected: str) -> None:
    assert expected in refusal(*REQUIRED, *flags.split())


ROUND_TRIPS = [
    (),
    ("--lora.r", "8", "--lora.target_modules", "q_proj", "v_proj", "--optim.learning_rate", "1e-5"),
    ("--data.eval", "e.jsonl", "--eval.every_steps", "5", "--data.shuffle", "false", "--train.max_steps", "3"),
    ("--parallel.engine", "deepspeed", "--parallel.ds_config", "ds_configs/zero3.json"),
]


@pytest.mark.parametrize("flags", ROUND_TRIPS)
def test_yaml_reads_back_to_an_equal_config(flags: tuple[str, ...], recipe: Any) -> None:
    config = parse(*flags)
    path = recipe(to_yaml(config, record={"torch": "2.13.0", "world": {"size": 2}}))
    assert parse_config(["--config", path]) == config
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)


@settings(deadline=None)
@given(name=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1))
def test_any_path_survives_the_round_trip(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = parse_config(["--model.path=m", f"--data.train={name}", f"--run.dir={name}"])
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse_config(["--config", str(path)]) == config


def test_print_config_prints_the_merge_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--lora.r", "8", "--print-config")
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["lora"]["alpha"], printed["optim"]["learning_rate"], printed["run"]["dir"]) == (None, 1e-5, "r")


def test_help_names_every_flag_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [key for key in known_keys() if not any(f"--{key} " in line for line in lines)] == []


def test_tools_print_the_error_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_or_exit(["--optim.lr", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unknown flag '--optim.lr': did you mean '--optim.learning_rate'?\n"


def test_changed_keys_are_those_that_change_the_trajectory(recipe: Any) -> None:
    saved = load_record(recipe(to_yaml(parse("--lora.r", "8"), record={"torch": "2.13.0"})))
    same = ("--run.dir", "x", "--log.every_steps", "1", "--batch.layout", "padded", "--parallel.engine", "fsdp2")
    assert changed_keys(saved, parse("--lora.r", "8", *same, "--train.stop_after_steps", "3")) == []
    other = parse("--lora.r", "4", "--loss.beta", "0.3")
    assert changed_keys(saved, other) == [("loss.beta", 0.1, 0.3), ("lora.r", 8, 4)]


def test_keys_that_an_older_run_did_not_save_count_as_defaults() -> None:
    saved = to_dict(parse())
    del saved["optim"]["adam_epsilon"]
    assert changed_keys(saved, parse()) == []
    assert changed_keys(saved, parse("--optim.adam_epsilon", "1e-6")) == [("optim.adam_epsilon", 1e-8, 1e-6)]


def test_a_config_error_answers_at_once() -> None:
    code = "import sys; from dpo.config import parse_or_exit; parse_or_exit(sys.argv[1:])"
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # of the processor: the machine may be busy
    done = subprocess.run([sys.executable, "-c", code, "--nope"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 1
