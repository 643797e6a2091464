#!/usr/bin/env bash
# Run the tests; installs what they need on the first call.
#
#   tests/run.sh [arguments of pytest]       the fast tier: everything not marked slow
#   tests/run.sh --all [arguments]           what CI runs: lint, format, types, shell scripts, every test, the test cluster
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"
cd "$ROOT"
setup_environment --dev
export OMP_NUM_THREADS=1 # several ranks and several test runs share the cores
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"

check_sources() {
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m pyright --pythonpath "$PYTHON"
    git ls-files -z --cached --others --exclude-standard '*.sh' '*.sbatch' .ci/run | xargs -0 shellcheck -x
}

if [[ "${1:-}" == --all ]]; then
    shift
    check_sources
    "$PYTHON" -m pytest "$@"
    exec tests/cluster/run.sh # says so where it cannot run
fi
exec "$PYTHON" -m pytest -m "not slow" "$@"
