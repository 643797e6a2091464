"""How long a sequence may be, by the model's own configuration."""

from __future__ import annotations

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig, PretrainedConfig

from dpo.pretrained import Pretrained


@pytest.mark.parametrize(
    ("config", "positions"),
    [(GPT2Config(n_positions=16), 16), (LlamaConfig(max_position_embeddings=32), 32), (BloomConfig(), None)],
)
def test_positions_are_found_under_the_familys_own_name(config: PretrainedConfig, positions: int | None) -> None:
    assert Pretrained("", config, {}, False).max_positions == positions
