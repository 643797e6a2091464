"""Which trainers are compared, in which settings; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RIVALS = ("trl-default", "trl-tuned")
REFERENCES: dict[str, str | None] = {"live": None, "stored-cold": "stored", "stored-warm": "stored"}
"""Value of reference.mode for each way of having a reference; None: the default. Each run starts with an empty store,
which its first step fills: cold is that step, warm every later one."""


@dataclass(frozen=True, slots=True)
class Side:
    """One trainer's settings.

    Attributes:
        name: ours, trl-default or trl-tuned.
        mode: full or lora.
        steps: steps over which the learning rate decays; no more are taken.
        layout, reference, tokens_per_micro_batch: ours.
        micro_batch: TRL's pairs per micro-batch.
        device: cpu (in fp32) or cuda (in bf16).
        flags: further flags of ours.
        folder: where it may write.
    """

    name: str
    mode: str
    steps: int
    folder: str
    layout: str = "auto"
    reference: str = "live"
    tokens_per_micro_batch: int = 8192
    micro_batch: int = 8
    device: str = "cpu"
    flags: tuple[str, ...] = ()

    @property
    def choices(self) -> dict[str, str | int]:
        """What of our config a comparison is about; the config refuses layouts and references it does not know."""
        choices: dict[str, str | int] = {
            "batch.layout": self.layout,
            "batch.tokens_per_micro_batch": self.tokens_per_micro_batch,
        }
        if (mode := REFERENCES[self.reference]) is not None:
            choices |= {"reference.mode": mode, "reference.store": f"{self.folder}/store"}
        return choices


def as_flags(values: Mapping[str, object]) -> list[str]:
    """A command line of train_dpo.py."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]
