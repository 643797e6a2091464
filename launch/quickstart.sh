#!/usr/bin/env bash
# From nothing to an aligned model: environment, model, LoRA DPO, held-out accuracy and margin before and after.
#
#   launch/quickstart.sh [flags of train_dpo.py]       for example --train.max_steps 2
#   DRY_RUN=1 launch/quickstart.sh                     prints what it would run
#
# Needs Python 3.11 or newer and a package index. Stopped or killed, the same command goes on from the last checkpoint.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT" # the recipe's paths are relative to it

if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "$ROOT/launch/setup.sh"
    printf '\n%q %q\n' "$PYTHON" "$ROOT/launch/quickstart_model.py"
else
    setup_environment
    "$PYTHON" "$ROOT/launch/quickstart_model.py"
fi
exec "$ROOT/launch/local.sh" -n 1 --config launch/recipes/quickstart.yaml "$@"
