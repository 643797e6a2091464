#!/usr/bin/env bash
# Pairs per second, MFU and memory on one GPU against TRL, without network: see README.md beside this file.
#
#   benchmarks/gpu.sh [--only REGEX] [--budget_s S] [--record FILE]
#   benchmarks/gpu.sh --device cpu --size tiny --record FILE
#
# Installs nothing: uses $PYTHON, else the active virtual environment, else .venv, else python3.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="${VIRTUAL_ENV:-$ROOT/.venv}/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m benchmarks.gpu "$@"
