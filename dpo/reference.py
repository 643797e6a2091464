"""The frozen reference: log-probs of the model before training.

One method, `logps(batch)`, two sources: the policy with its adapter off (LoRA: same weights, no second copy), or a
frozen copy held like the policy. Both start from `model.path` (or `reference.path`), never from a checkpoint, so that a
resumed run still scores with the original weights.
"""

from __future__ import annotations

from torch import Tensor

from data_utils.schema import PairBatch
from dpo.config import Config
from dpo.engine import Engine, Scorer
from dpo.policy import Pretrained, evaluating


class Reference:
    """Scores batches with the model before training."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def logps(self, batch: PairBatch) -> Tensor:
        """(S,) summed log-probs of the responses under the reference, without grad."""
        return self._scorer(batch)


def open_reference(config: Config, source: Pretrained) -> Pretrained:
    """The model that serves as the reference: `reference.path`, or the policy's own starting weights.

    Raises:
        ConfigError: `reference.path` is no model.
    """
    if config.reference.path is None:
        return source
    model = config.model
    return Pretrained.open(config.reference.path, model.attn_implementation, model.trust_remote_code, "reference.path")


def build_reference(config: Config, source: Pretrained, engine: Engine) -> Reference:
    """The reference that the config asks for; `source` is what `open_reference` gave."""
    if config.reference_source == "adapter_off":
        return Reference(_adapter_off(engine))
    return Reference(engine.frozen_scorer(source, config.reference.offload))


def _adapter_off(engine: Engine) -> Scorer:
    def score(batch: PairBatch) -> Tensor:
        with evaluating(engine.policy), engine.policy.adapter_off():
            logps_S, _ = engine.forward(batch)
        return logps_S

    return score
