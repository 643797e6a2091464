"""What comes with a model is not run, and what is secret is not written down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dpo
from tests.tiny import tiny_model, tiny_pairs

TOKENS = {"HF_TOKEN": "hf_planted0123456789", "WANDB_API_KEY": "planted9876543210abcdef"}
MARKER = "from pathlib import Path\nPath({path!r}).touch()\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    tiny_model(folder / "model")
    tiny_pairs(folder / "train.jsonl", 12)
    return folder


def train(folder: Path, name: str, *flags: str) -> int:
    return train_dpo.main(
        [
            *("--model.path", str(folder / "model"), "--data.train", str(folder / "train.jsonl")),
            *("--run.dir", str(folder / name), "--batch.pairs_per_step", "6", "--log.every_steps", "1"),
            *("--checkpoint.every_steps", "1", *flags),
        ]
    )


def test_a_token_in_the_environment_is_in_no_artefact(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    assert train(folder, "run") == 0
    out, err = capfd.readouterr()
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in files) and any(path.name == "config.yaml" for path in files)
    for token in TOKENS.values():
        assert token not in out + err
        assert [path for path in files if token.encode() in path.read_bytes()] == []


def model_with_code(folder: Path, name: str, model_type: str) -> Path:
    path = folder / name
    shutil.copytree(folder / "model", path)
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(MARKER.format(path=str(folder / "ran")))
    return path


@pytest.mark.parametrize(("model_type", "code"), [("unheard_of", 2), ("llama", 0)])
def test_code_that_comes_with_a_model_is_not_run(
    folder: Path, model_type: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that needs it is refused; one that transformers knows is loaded with transformers' own."""
    path = model_with_code(folder, f"code-{model_type}", model_type)
    assert train(folder, f"run-{model_type}", "--model.path", str(path)) == code
    assert not (folder / "ran").exists()
    if code:
        assert "trust_remote_code" in capsys.readouterr().err


def test_pickled_weights_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "pickled"
    shutil.copytree(folder / "model", path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert train(folder, "run-pickled", "--model.path", str(path)) == 2
    assert "no *.safetensors there; convert its weights" in capsys.readouterr().err
