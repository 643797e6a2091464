"""The sections of the config: frozen dataclasses whose field docstrings become `--help`, a file for each group.

Each section refuses what cannot work, or what would be ignored, in `__post_init__`; `Config` checks across sections.
Imports nothing but the standard library, so that `--help` and every check answer at once.
"""

from dpo.sections.config import Config
from dpo.sections.data import BatchSection, DataSection, DataSource
from dpo.sections.loss import LossSection
from dpo.sections.model import LoraSection, ModelSection, ReferenceSection
from dpo.sections.results import CheckpointSection, EvalSection, ExportSection, LogSection, RunSection
from dpo.sections.training import SHIPPED_DS_CONFIGS, OptimSection, ParallelSection, TrainSection

__all__ = [
    "SHIPPED_DS_CONFIGS",
    "BatchSection",
    "CheckpointSection",
    "Config",
    "DataSection",
    "DataSource",
    "EvalSection",
    "ExportSection",
    "LogSection",
    "LoraSection",
    "LossSection",
    "ModelSection",
    "OptimSection",
    "ParallelSection",
    "ReferenceSection",
    "RunSection",
    "TrainSection",
]
