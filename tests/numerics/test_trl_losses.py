"""Every loss that TRL 1.16 has, against TRL's own code: loss and gradients of given log-probs, and of all weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from data_utils.batching import collate
from data_utils.schema import PairBatch
from dpo.config import LossSection
from dpo.logps import sum_by_sequence, tail_weights
from dpo.objective import Objective
from dpo.policy import Policy
from dpo.pretrained import Pretrained
from tests.numerics.test_trl import Lab, our_pairs
from tests.numerics.tiny_models import perturbed, random_pairs

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A loss in our words and in TRL's."""

    ours: dict[str, Any]
    theirs: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


def same(name: str, theirs: str = "", **settings: Any) -> Case:
    return Case({"type": (name,), **settings}, (theirs or name,), settings)


def divergence(name: str, *types: str, **settings: Any) -> Case:
    ours = {"f_divergence": name, **settings, "type": types}
    return Case(ours, types, {"f_divergence_type": name, **settings})


CASES = {
    **{
        name: same(name)
        for name in ("sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
    },
    "sigmoid_norm": same("sigmoid_norm", beta=2.0),
    "exo_pair": same("exo_pair", label_smoothing=1e-3),
    "robust": same("robust", label_smoothing=0.2),
    "bco_pair": same("bco_pair_no_shift", "bco_pair"),
    "sft": same("sft_micro_batch", "sft"),
    "aot": same("aot_micro_batch", "aot"),
    "aot_smoothed": same("aot_micro_batch", "aot", label_smoothing=0.1),
    "aot_unpaired": same("aot_unpaired_micro_batch", "aot_unpaired"),
    "mpo": Case(
        {"type": ("sigmoid", "bco_pair_no_shift", "sft_micro_batch"), "weights": (0.8, 0.2, 1.0)},
        ("sigmoid", "bco_pair", "sft"),
        {"weights": (0.8, 0.2, 1.0)},
    ),
    "forward_kl": divergence("forward_kl", "sigmoid", "ipo"),
    "js_divergence": divergence("js_divergence", "sigmoid_norm", "hinge"),
    "alpha_divergence": divergence("alpha_divergence", "sigmoid", f_alpha_divergence_coef=0.3),
    "ld": same("sigmoid", ld_alpha=0.4),
    "ld_ipo": same("ipo", ld_alpha=0.0),
    "wpo": Case({"type": ("sigmoid",), "wpo": True}, ("sigmoid",), {"use_weighting": True}),
    "wpo_mixed": Case(
        {"type": ("apo_zero", "nca_pair"), "wpo": True}, ("apo_zero", "nca_pair"), {"use_weighting": True}
    ),
}
BETA = 0.1


def dressed(trainer: Any, case: Case) -> Any:
    """TRL's trainer with the settings of a case."""
    settings = dict(case.settings)
    trainer.loss_types = list(case.theirs)
    trainer.loss_weights = list(settings.pop("weights", [1.0] * len(case.theirs)))
    defaults = {
        "beta": BETA,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
    }
    for name, value in (defaults | settings).items():
        setattr(trainer, name, value)
    return trainer


@dataclass
class Given:
    """Log-probs of tokens, in our batch's order and in TRL's padded rows: six pairs after prompts of two tokens."""

    batch: PairBatch
    policy_N: Tensor
    reference_N: Tensor
    statistic_N: Tensor
    mask: Tensor

    @staticmethod
    def make(dtype: torch.dtype) -> Given:
        generator = torch.Generator().manual_seed(0)
        batch = collate(random_pairs(6), "packed", pad_token_id=0)
        num_scored = len(batch.labels_N)
        lengths = batch.response_lengths_S.long()
        columns = torch.arange(2 + int(lengths.max()))
        mask = (columns >= 2) & (columns < 2 + lengths[:, None])

        def logps(scale: float) -> Tensor:
            return -scale * torch.rand(num_scored, dtype=torch.float64, generator=generator).to(dtype)

        policy_N = logps(4.0)
        nan_B = torch.full((6,), torch.nan, dtype=dtype)
        batch = replace(batch, response_lengths_S=lengths.to(dtype), beta_B=nan_B, margin_B=nan_B, label_B=nan_B)
        return Given(batch, policy_N.requires_grad_(), policy_N.detach() + logps(2.0) + 1, logps(3.0), mask.long())

    def rows(self, values_N: Tensor) -> Tensor:
        """(S, T - 1) as TRL has them, 0 elsewhere."""
        shifted = self.mask[:, 1:].bool()
        return torch.zeros(shifted.shape, dtype=values_N.dtype).masked_scatter(shifted, values_N)

    def sums(self, values_N: Tensor, tail_weight: float = 1.0) -> Tensor:
        """(S,) sums over responses."""
        weight_N = tail_weights(self.batch.response_lengths_S, self.batch.sequence_of_N, tail_weight).to(values_N.dtype)
        return sum_by_sequence(values_N * weight_N, self.batch.sequence_of_N, 12)


def their_loss(given: Given, case: Case) -> Tensor:
    """TRL's `_compute_loss` over a model that says what is given."""
    from trl.trainer.dpo_trainer import DPOTrainer

    zeros = torch.zeros(given.mask[:, 1:].shape, dtype=torch.float64)
    outputs = SimpleNamespace(
        log_probs=given.rows(given.policy_N),
        log_sum_sq_probs=given.rows(given.statistic_N),
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value, gather=lambda value: value),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    dressed(trainer, case)
    reference = given.sums(given.reference_N, 1.0 if trainer.ld_alpha is None else trainer.ld_alpha).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(given.mask),
        "attention_mask": torch.ones_like(given.mask),
        "completion_mask": given.mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return DPOTrainer._compute_loss(cast(Any, trainer), lambda **_: outputs, inputs, return_outputs=False)


def our_loss(given: Given, case: Case) -> Tensor:
    objective = Objective(LossSection(**case.ours))
    pairs = objective.pairs(
        given.batch,
        given.sums(given.policy_N, objective.tail_weight),
        None if objective.statistic is None else given.sums(given.statistic_N),
        given.sums(given.reference_N, objective.tail_weight),
    )
    return objective.loss(pairs).mean()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_given_log_probs(name: str) -> None:
    dtype = torch.float32 if name == "alpha_divergence" else torch.float64  # TRL has it in 16 and 32 bits only
    given, case = Given.make(dtype), CASES[name]
    ours, theirs = our_loss(given, case), their_loss(given, case)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (ours_N,), (theirs_N,) = (torch.autograd.grad(loss, given.policy_N) for loss in (ours, theirs))
    assert ours_N.abs().max() > 0
    torch.testing.assert_close(ours_N, theirs_N, rtol=1e-6 if dtype == torch.float64 else 1e-5, atol=1e-9)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("trl_losses"))


@pytest.fixture(scope="module")
def trainer(lab: Lab) -> Any:
    """TRL's trainer of a policy some way from its reference, able to weigh as WPO does."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    reference = AutoModelForCausalLM.from_pretrained(lab.model_path, dtype=torch.float32)
    settings = DPOConfig(
        output_dir=str(lab.folder / "out"),
        use_weighting=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    return DPOTrainer(
        model=perturbed(reference, size=0.02),
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_json(str(lab.shard)),  # type: ignore[arg-type]
        processing_class=AutoTokenizer.from_pretrained(lab.model_path),
    )


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_all_weights(lab: Lab, trainer: Any, name: str) -> None:
    """Six pairs as one micro-batch; each parameter's gradient has TRL's norm to 1e-4."""
    case = CASES[name]
    dressed(trainer, case).model.train().zero_grad()
    rows = list(trainer.train_dataset)[:6]
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    theirs.backward()
    expected = {key: p.grad.norm().item() for key, p in trainer.model.named_parameters() if p.grad is not None}

    source = Pretrained.open(lab.model_path)
    reference_model = source.load(torch.float32)
    policy = Policy(perturbed(reference_model, size=0.02), source.logit_transform, "packed")
    reference = Policy(reference_model, source.logit_transform, "packed")
    objective = Objective(LossSection(**case.ours))
    batch = replace(collate(our_pairs(lab)[:6], "packed", 0), tail_weight=objective.tail_weight)
    with torch.no_grad():
        reference_logps_S, _ = reference(batch)
    policy_logps_S, statistic_S = policy(batch, objective.statistic)
    ours = objective.loss(objective.pairs(batch, policy_logps_S, statistic_S, reference_logps_S)).mean()
    ours.backward()
    found = {key: p.grad.norm().item() for key, p in policy.model.named_parameters() if p.grad is not None}
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-4) and min(found.values()) > 0
