"""The trainers under comparison, each ready to be stepped by a `Meter`: ours, and TRL's as installed or tuned."""

from __future__ import annotations

import runpy
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare_case import Case, ids_digest
from benchmarks.compare_meter import Meter
from benchmarks.compare_plan import ROOT, Side, as_flags
from data_utils.schema import PairBatch
from data_utils.shards import ShardSet
from data_utils.tokenize import PairTokenizer
from dpo.config import LoraSection, parse_config
from dpo.engine import StepResult
from dpo.loss_terms import PairLogps
from dpo.run import Run
from dpo.runlog import RunLog
from dpo.signals import StopRequest
from dpo.steps import AgreedStep
from dpo.world import World

SEED, BETA, MAX_GRAD_NORM = 42, 0.1, 1.0
LEARNING_RATES = {"full": 1e-3, "lora": 1e-2}
"""High, so that losses move by far more than the tolerance to which they must agree."""
OUR_TALKERS = {World: ("exchange", "gather_objects", "sum_on_device", "barrier")}


def our_flags(case: Case, side: Side) -> list[str]:
    """The command line of train_dpo.py."""
    flags = {
        "model.path": case.model,
        "model.dtype": "bfloat16" if side.device == "cuda" else "float32",
        "data.train": case.shard,
        "data.shuffle": "false",
        "data.max_length": case.size.max_length,
        "loss.beta": BETA,
        "lora.r": case.size.lora_rank if side.mode == "lora" else 0,
        "batch.pairs_per_step": case.size.pairs,
        "optim.learning_rate": LEARNING_RATES[side.mode],
        "optim.warmup_ratio": 0,
        "optim.max_grad_norm": MAX_GRAD_NORM,
        "train.epochs": side.steps,
        "train.seed": SEED,
        "parallel.device": side.device,
        "log.tensorboard": "false",
        "run.dir": f"{side.folder}/run",
    }
    return [*as_flags(flags | side.choices), *side.flags]


class MeteredRun(Run):
    """A `Run` whose steps a meter hands out; the loop around it is `train_dpo.train` itself."""

    meter: Meter

    def steps(self, first: int) -> Any:
        """See `Run`: the meter starts before anything of the first step is made, so that filling a store is counted."""
        facts = {"ids_sha256": self._ids_digest(), "layout": self.parts.layout, "why": self.parts.why_layout}
        self.meter.start([self.engine.policy], facts)
        steps = super().steps(first)
        while True:
            with self.meter.aside():
                step = next(steps, None)
            if step is None:
                return
            self._pair_weight = step.pair_weight
            yield step

    def _check_step0(self) -> None:
        """No gate here, which would be counted with the first step: TRL has none, and losses are held equal."""

    def count(self, batch: PairBatch, pairs: PairLogps, loss_B: Tensor) -> None:
        """See `Run`."""
        super().count(batch, pairs, loss_B)
        loss = (batch.weight_B * loss_B.detach()).sum() * self._pair_weight
        self.meter.micro_step(loss, batch.num_tokens, batch.num_slots)

    def after(self, step: AgreedStep, result: StepResult) -> None:
        """See `Run`."""
        super().after(step, result)
        self.meter.step_done()

    def _ids_digest(self) -> str:
        """Of what the loader makes of the pairs, in the order of the shard."""
        pairs = sorted(self.loader.reader.read(0).pairs, key=lambda pair: pair.index)
        return ids_digest([(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs])


def run_ours(case: Case, side: Side, meter: Meter) -> None:
    """Build a run as `dpo.session` does and train until the meter ends it."""
    config = parse_config(our_flags(case, side))
    world = World.start(config.parallel.device)
    run = MeteredRun(config, world, RunLog(config, world), StopRequest())
    run.meter = meter
    shards = ShardSet.open([f"{case.folder}/tokenize.jsonl"])
    pairs = [shards.pair(index) for index in range(len(shards))]
    tokenize = PairTokenizer(run.parts.tokenizer, case.size.max_length)

    def tokenize_all() -> dict[str, Any]:
        since = time.process_time()
        for start in range(0, len(pairs), case.size.pairs):
            batch = pairs[start : start + case.size.pairs]
            tokenize.many(batch, range(len(batch)))
        return {"cpu_seconds": time.process_time() - since, "pairs": len(pairs)}

    meter.extras["tokenize"] = tokenize_all
    loop = runpy.run_path(str(ROOT / "train_dpo.py"))["train"]  # a program, which nothing imports
    loop(run)


def run_trl(case: Case, side: Side, meter: Meter) -> None:
    """Train with TRL's DPOTrainer until the meter ends it."""
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.dpo_trainer import DPOTrainer

    accumulation = case.size.pairs // side.micro_batch

    class Metered(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            mask = inputs["attention_mask"]
            tokens = int(mask.numpy().sum()) if mask.device.type == "cpu" else 0  # elsewhere it would be one more sync
            meter.micro_step(loss / accumulation, tokens, mask.numel())
            return loss

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            with meter.aside():
                return super().get_batch_samples(*args, **kwargs)

    class Steps(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ids = [_cut(row, case.size.max_length) for row in rows]
            meter.start(
                [m for m in (trainer.model, trainer.ref_model) if m is not None], {"ids_sha256": ids_digest(ids)}
            )

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.step_done()

    meter.talkers = {Accelerator: ("gather", "reduce")}
    trainer = _trl_trainer(case, side, Metered, accumulation)
    trainer.add_callback(Steps())
    rows: list[dict[str, Any]] = list(trainer.train_dataset)
    texts = case.rows("tokenize.jsonl")

    def tokenize_all() -> dict[str, Any]:
        data = Dataset.from_list(texts)
        since = time.process_time()
        trainer._prepare_dataset(data, trainer.processing_class, trainer.args, "train")
        return {"cpu_seconds": time.process_time() - since, "pairs": len(texts)}

    meter.extras["tokenize"] = tokenize_all
    trainer.train()


def _cut(row: dict[str, Any], max_length: int) -> tuple[list[int], list[int], list[int]]:
    """A row of TRL's data set as its collator leaves it."""
    room = max_length - len(row["prompt_ids"])
    return row["prompt_ids"], row["chosen_ids"][:room], row["rejected_ids"][:room]


def _trl_trainer(case: Case, side: Side, cls: Any, accumulation: int) -> Any:
    """TRL's trainer with our adapter's start."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig

    from dpo.policy import add_lora
    from dpo.pretrained import Pretrained

    rank = case.size.lora_rank
    adapter = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    rows = [row | {"length": length} for row, length in zip(case.rows(), case.lengths, strict=True)]
    trainer = cls(
        model=AutoModelForCausalLM.from_pretrained(case.model, dtype=_trl_dtype(side)),
        args=DPOConfig(**trl_settings(case, side, accumulation)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(case.model),
        peft_config=adapter if side.mode == "lora" else None,
    )
    if side.mode == "lora":
        our_start = add_lora(Pretrained.open(case.model).load(torch.float32), LoraSection(r=rank), SEED)
        set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(our_start))
    return trainer


def _trl_dtype(side: Side) -> torch.dtype:
    """Of TRL's weights: fp32 on a CPU; on a GPU bf16 where it is tuned or trains an adapter, else fp32 and autocast."""
    in_bf16 = side.device == "cuda" and (side.name == "trl-tuned" or side.mode == "lora")
    return torch.bfloat16 if in_bf16 else torch.float32


def trl_settings(case: Case, side: Side, accumulation: int) -> dict[str, Any]:
    """Our settings in TRL's words. As installed, TRL checkpoints activations and runs the reference in every step;
    tuned, it does neither and groups by length. Both take their pairs in our order, else each step would differ."""
    settings: dict[str, Any] = {
        "output_dir": f"{side.folder}/trl",
        "per_device_train_batch_size": side.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "max_length": case.size.max_length,
        "beta": BETA,
        "learning_rate": LEARNING_RATES[side.mode],
        "lr_scheduler_type": "linear",
        "max_grad_norm": MAX_GRAD_NORM,
        "num_train_epochs": side.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": side.device == "cpu",
        "bf16": side.device == "cuda",
        "seed": SEED,
    }
    if side.name == "trl-tuned":
        settings |= {
            "precompute_ref_log_probs": True,
            "gradient_checkpointing": False,
            "train_sampling_strategy": "group_by_length",
            "remove_unused_columns": False,  # else the column of lengths is gone before the sampler asks for it
        }
    return settings
