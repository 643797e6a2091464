#!/usr/bin/env bash
# Run a module of this repository that installs nothing: benchmarks/module.sh MODULE [ARGUMENTS]
#
# Uses $PYTHON, else the active virtual environment, else .venv, else python3; packages may come through PYTHONPATH.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="${VIRTUAL_ENV:-$ROOT/.venv}/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
# Triton and DeepSpeed compile into a folder of ours, not into one that all projects of a user share.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$ROOT/.cache/torch_extensions}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m "$@"
