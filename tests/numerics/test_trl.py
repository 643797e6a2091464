"""Step by step against TRL 1.16: the same weights, pairs and settings give the same training run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_utils.batching import collate
from data_utils.schema import TokenizedPair
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from dpo.config import LoraSection
from dpo.policy import Policy, add_lora
from dpo.pretrained import Pretrained
from tests.tiny import tiny_model, tiny_pairs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SEED, BETA, STEPS, PAIRS_PER_STEP, PAIRS_PER_DEVICE = 42, 0.3, 10, 4, 2
WEIGHT_DECAY, WARMUP = 0.1, 0.2
LEARNING_RATES = {"full": 1e-3, "lora": 2e-2, "moving": 1e-3}
MAX_GRAD_NORM = {"full": 7.5, "lora": 2.5, "moving": 7.5}
LEARNED = {"full": 0.6, "lora": 0.6, "moving": 0.65}
SYNC_STEPS, MIXUP_ALPHA = 3, 0.4  # of TR-DPO, kind "moving"
LORA = LoraSection(r=4)
SAME_KEYS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
TIED_STEPS = 2
"""The warm-up's first step has rate 0, so two steps start with all pairs tied: half right to us, wrong to TRL."""


@dataclass
class Lab:
    """A tiny Llama, a shard of pairs, and where runs go."""

    folder: Path

    def __post_init__(self) -> None:
        self.model_path = str(tiny_model(self.folder / "model", tied=False, chat_template=None))
        self.shard = tiny_pairs(self.folder / "pairs.jsonl", STEPS * PAIRS_PER_STEP)

    def ours(self, kind: str, layout: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run of `train_dpo.py`."""
        run = self.folder / f"{kind}-{layout}"
        flags: dict[str, Any] = {
            "model.path": self.model_path,
            "model.dtype": "float32",
            "data.train": self.shard,
            "data.shuffle": "false",
            "loss.beta": BETA,
            "lora.r": LORA.r if kind == "lora" else 0,
            "batch.pairs_per_step": PAIRS_PER_STEP,
            "batch.tokens_per_micro_batch": 160,
            "batch.layout": layout,
            "optim.learning_rate": LEARNING_RATES[kind],
            "optim.weight_decay": WEIGHT_DECAY,
            "optim.warmup_ratio": WARMUP,
            "optim.max_grad_norm": MAX_GRAD_NORM[kind],
            "train.seed": SEED,
            "parallel.device": "cpu",
            "log.every_steps": 1,
            "log.tensorboard": "false",
            "run.dir": run,
        }
        if kind == "moving":
            flags |= {"reference.sync_steps": SYNC_STEPS, "reference.mixup_alpha": MIXUP_ALPHA}
        command = [sys.executable, "train_dpo.py"]
        for key, value in flags.items():
            command += [f"--{key}", str(value)]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("trl"))


@dataclass
class Theirs:
    """What TRL's trainer did.

    Attributes:
        pairs: its (prompt, chosen, rejected) token ids, in its order.
        logps: summed log-probs of its first micro-batch under the reference, chosen then rejected.
        steps: logged metrics of every step, the loss at full precision.
    """

    pairs: list[tuple[list[int], list[int], list[int]]]
    logps: Tensor
    steps: list[dict[str, float]]


@pytest.fixture(scope="module", params=["full", "lora", "moving"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def theirs(lab: Lab, kind: str) -> Theirs:
    trainer, micro_losses = trl_trainer(lab, kind)
    rows: list[dict[str, Any]] = list(trainer.train_dataset)
    first = trainer.data_collator(rows[:PAIRS_PER_DEVICE])
    logps = torch.cat(trainer.compute_ref_log_probs(trainer.model if kind == "lora" else trainer.ref_model, first))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    for number, entry in enumerate(steps):
        entry["loss"] = sum(micro_losses[number]) / len(micro_losses[number])
    return Theirs([(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows], logps, steps)


def trl_trainer(lab: Lab, kind: str) -> tuple[Any, dict[int, list[float]]]:
    """TRL's trainer with our adapter's start, and where it notes each micro-batch's loss by step."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_trainer import DPOTrainer

    micro_losses: dict[int, list[float]] = defaultdict(list)

    class Recorder(DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            micro_losses[self.state.global_step].append(loss.item())
            return loss

    adapter = LoraConfig(task_type="CAUSAL_LM", r=LORA.r, lora_alpha=2 * LORA.r, target_modules="all-linear")
    trainer = Recorder(
        model=AutoModelForCausalLM.from_pretrained(lab.model_path, dtype=torch.float32),
        args=trl_settings(lab, kind),
        train_dataset=Dataset.from_json(str(lab.shard)),  # type: ignore[arg-type]
        processing_class=AutoTokenizer.from_pretrained(lab.model_path),
        peft_config=adapter if kind == "lora" else None,
    )
    if kind == "lora":
        our_start = add_lora(Pretrained.open(lab.model_path).load(torch.float32), LORA, SEED)
        set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(our_start))
    return trainer, micro_losses


def trl_settings(lab: Lab, kind: str) -> Any:
    """Our settings in TRL's words; order, precision and checkpointing would differ by default."""
    from trl.trainer.dpo_config import DPOConfig

    return DPOConfig(
        output_dir=str(lab.folder / f"trl-{kind}"),
        per_device_train_batch_size=PAIRS_PER_DEVICE,
        gradient_accumulation_steps=PAIRS_PER_STEP // PAIRS_PER_DEVICE,
        train_sampling_strategy="sequential",
        beta=BETA,
        learning_rate=LEARNING_RATES[kind],
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM[kind],
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        sync_ref_model=kind == "moving",
        ref_model_sync_steps=SYNC_STEPS,
        ref_model_mixup_alpha=MIXUP_ALPHA,
        seed=SEED,
    )


def our_pairs(lab: Lab) -> list[TokenizedPair]:
    from transformers import AutoTokenizer

    shards = ShardSet.open([str(lab.shard)])
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(lab.model_path), max_length=256)
    return [tokenize(shards.pair(index), index) for index in range(len(shards))]


def test_token_ids_are_the_same(lab: Lab, theirs: Theirs) -> None:
    ours = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in our_pairs(lab)]
    assert len(ours) == STEPS * PAIRS_PER_STEP and ours == theirs.pairs


def test_log_probs_are_the_same(lab: Lab, theirs: Theirs) -> None:
    source = Pretrained.open(lab.model_path)
    policy = Policy(source.load(torch.float32), source.logit_transform, "packed")
    with torch.no_grad():
        logps_S, _ = policy(collate(our_pairs(lab)[:PAIRS_PER_DEVICE], "packed", pad_token_id=0))
    torch.testing.assert_close(logps_S, theirs.logps, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_every_step_is_the_same(lab: Lab, kind: str, theirs: Theirs, layout: str) -> None:
    ours = lab.ours(kind, layout)
    assert len(ours) == len(theirs.steps) == STEPS
    assert ours[-1]["loss"] < LEARNED[kind], "it must have learned something"
    clipped = [row["grad_norm"] > MAX_GRAD_NORM[kind] for row in ours]
    assert any(clipped) and not all(clipped)
    for row, their_row in zip(ours, theirs.steps, strict=True):
        assert row["learning_rate"] == pytest.approx(their_row["learning_rate"], rel=1e-9)
        assert row["loss"] == pytest.approx(their_row["loss"], abs=2e-5)
        assert row["grad_norm"] == pytest.approx(their_row["grad_norm"], rel=1e-5)
        keys = SAME_KEYS if row["step"] <= TIED_STEPS else [*SAME_KEYS, "rewards/accuracies"]
        assert [row[key] for key in keys] == pytest.approx([their_row[key] for key in keys], abs=5e-5)
