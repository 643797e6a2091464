"""The planner's table for Llama 3.1 8B and 70B, as Markdown: `python -m benchmarks.plan_table`.

The shapes are the published ones, written into a scratch folder; no hub, no weights, no GPU.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo.config import Config, parse_config
from dpo.planner import GIB, Machine, report

COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
SIZES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
FSDP2 = ("--parallel.engine", "fsdp2")
ZERO3 = ("--parallel.engine", "deepspeed", "--parallel.ds_config", "ds_configs/zero3.json")
LORA = ("--lora.r", "16")
QLORA = (*LORA, "--model.quantization", "nf4")
ROWS: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("8B", "full, FSDP2", 8, FSDP2),
    ("8B", "full, ZeRO-3", 8, ZERO3),
    ("8B", "LoRA, one GPU", 1, LORA),
    ("8B", "LoRA, FSDP2", 8, (*FSDP2, *LORA)),
    ("8B", "QLoRA, one GPU", 1, QLORA),
    ("70B", "full, FSDP2", 16, FSDP2),
    ("70B", "full, ZeRO-3", 32, ZERO3),
    ("70B", "LoRA, FSDP2", 8, (*FSDP2, *LORA)),
    ("70B", "LoRA, ZeRO-3", 8, (*ZERO3, *LORA)),
    ("70B", "QLoRA, one GPU", 1, QLORA),
    ("70B", "QLoRA, FSDP2", 8, (*FSDP2, *QLORA)),
    ("70B", "QLoRA, ZeRO-3", 8, (*ZERO3, *QLORA)),
)
SHARED = ("--batch.tokens_per_micro_batch", "4096", "--train.gradient_checkpointing", "true")
HEADER = "| Llama 3.1 | GPUs | weights | gradients | optimizer | reference | activations | rest | total | of 80 GiB |"


def llama_config(folder: Path, size: str) -> Path:
    """A folder that names a Llama of a size and holds no weights; for what only counts."""
    (folder / "config.json").write_text(json.dumps(COMMON | SIZES[size]))
    (folder / "model.safetensors").touch()
    return folder


def config_of(model: Path, flags: tuple[str, ...]) -> Config:
    """A config with the flags that all rows share."""
    return parse_config(["--model.path", str(model), "--data.train", "-", "--run.dir", "-", *SHARED, *flags])


def plans(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each row's size, name and plan."""
    for size in SIZES:
        (folder / size).mkdir()
        llama_config(folder / size, size)
    for size, name, gpus, flags in ROWS:
        machine = Machine(gpus, 80, 8, 989, 0.4, 800, 500, 60_000)
        yield size, name, report(config_of(folder / size, flags), machine)


def line(size: str, name: str, plan: dict[str, Any]) -> str:
    """A row of the table, in GiB."""
    parts = plan["device"]
    shown = [parts[part] for part in ("weights", "gradients", "optimizer", "reference", "activations")]
    shown += [parts["head"] + parts["buffers"] + parts["allowance"], plan["device_total"]]
    cells = " | ".join(f"{value / GIB:.1f}" for value in shown)
    return f"| {size} {name} | {plan['gpus']} | {cells} | {'fits' if plan['fits'] else 'no'} |"


def main() -> None:
    """Print the table."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    with tempfile.TemporaryDirectory() as folder:
        for row in plans(Path(folder)):
            print(line(*row), flush=True)


if __name__ == "__main__":
    main()
