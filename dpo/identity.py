"""What a reference log-prob depends on, as facts whose hash names the folder of a store.

In it: the bytes of the weights, how they are quantized, the model's configuration, the dtype of compute, the kind of
device, the attention that was asked for, the versions of torch and transformers, and the version of our scoring. Not in
it: how the pairs are laid out, batched and sharded, and the exact attention kernels (eager, sdpa, flash, ours), which
all compute one function and differ by rounding, below what the check at step 0 allows. Token ids are hashed with each
pair (`pair_key`), so tokenizer, chat template and max_length need no place here.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from dpo.config import ConfigError
from dpo.pretrained import Pretrained
from dpo.store import read_json, write_json

SCORING_VERSION = 1
"""To be raised when a change of ours moves log-probs by more than rounding."""
_EXACT_ATTENTION = {
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
}
_NOT_IN_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_SETTLED_S = 2.0
_HASHES = "hashes.json"

Facts = dict[str, Any]


def reference_facts(source: Pretrained, dtype: torch.dtype, device: torch.device, attention: str | None) -> Facts:
    """All that a number of the store depends on but the weights: small values that JSON knows.

    Args:
        attention: `model.attn_implementation`.
    """
    settings = {key: value for key, value in source.config.to_dict().items() if key not in _NOT_IN_CONFIG}
    quantized = {} if source.quantization is None else {"quantization": asdict(source.quantization)}
    return quantized | {
        "config": _digest(settings),
        "dtype": str(dtype).removeprefix("torch."),
        "matmul": torch.get_float32_matmul_precision() if dtype == torch.float32 else "",
        "device": device.type,
        "attention": "exact" if attention in _EXACT_ATTENTION else attention,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "scoring": SCORING_VERSION,
    }


def identity_of(facts: Facts) -> str:
    """The name of the folder of these facts: 128 bits."""
    return _digest(facts)[:32]


def making_facts(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Facts:
    """What token ids depend on, so that a run can say why pairs are not in a store."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else backend.to_str()
    return {
        "tokenizer": _digest(vocabulary)[:8],
        "chat_template": _digest(str(tokenizer.chat_template))[:8],
        "max_length": max_length,
    }


def weights_sha(source: Pretrained, home: Path) -> str:
    """SHA-256 over the names and bytes of the files that the weights are read from, tensors never loaded.

    Args:
        home: folder of the store, where hashes of files are remembered by their size, times and inode.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        files = _weight_files(_folder_of(source))
        remembered = read_json(home / _HASHES)
        known = {path: _remembered(path, remembered) for path in files}
        new = [path for path, digest in known.items() if digest is None]
        if new:
            with ThreadPoolExecutor(max_workers=min(4, len(new))) as pool:
                known |= dict(zip(new, pool.map(_file_digest, new), strict=True))
            _remember({path: digest for path, digest in known.items() if digest is not None and path in new}, home)
    except OSError as error:
        raise ConfigError(f"{source.key}={source.path}: {error.filename}: {error.strerror or error}") from error
    return _digest([(path.name, known[path]) for path in files])


def _folder_of(source: Pretrained) -> Path:
    """The folder with the model's files; of a hub name, that of the local snapshot."""
    if Path(source.path).is_dir():
        return Path(source.path)
    patterns = ["*.safetensors", "*.json", "*.py"]
    return Path(snapshot_download(source.path, allow_patterns=patterns, ignore_patterns=["consolidated*"]))


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers reads: one file, or the ones that the index names; and code and adapters beside them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in names]
    else:
        files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    return sorted({*files, *folder.glob("*.py"), *folder.glob("adapter_*")})


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_of(path: Path) -> list[int]:
    """What changes when a file's bytes do; nobody can set the last of them."""
    status = path.stat()
    return [status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _remembered(path: Path, remembered: Mapping[str, Any]) -> str | None:
    entry = remembered.get(str(path.resolve()))
    return entry["sha256"] if isinstance(entry, dict) and entry.get("state") == _state_of(path) else None


def _remember(digests: Mapping[Path, str], home: Path) -> None:
    """Add to the file of hashes; not those of files so young that a change might not show in their times."""
    settled = {
        str(path.resolve()): {"state": _state_of(path), "sha256": digest}
        for path, digest in digests.items()
        if time.time() - max(path.stat().st_mtime, path.stat().st_ctime) > _SETTLED_S
    }
    if settled:
        entries = {path: entry for path, entry in read_json(home / _HASHES).items() if os.path.exists(path)}
        write_json(home / _HASHES, entries | settled)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
