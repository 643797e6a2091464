#!/usr/bin/env bash
# Equal numbers from all engines and what they cost, on one GPU, without network: see README.md beside this file.
#
#   benchmarks/gpu_smoke.sh [--budget_s S] [--only REGEX] [--record FILE]
#   benchmarks/gpu_smoke.sh --device cpu --size tiny --record FILE
#
# Installs nothing: uses $PYTHON, else the active virtual environment, else .venv, else python3.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="${VIRTUAL_ENV:-$ROOT/.venv}/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
# Triton and DeepSpeed compile into a folder of ours, not into one that all projects of a user share.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$ROOT/.cache/torch_extensions}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu_smoke "$@"
