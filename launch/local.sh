#!/usr/bin/env bash
# Train on this machine: launch/local.sh [-n PROCS] [--config FILE] [flags of train_dpo.py]
#
# -n 1 (the default) runs train_dpo.py itself, -n 2 and more runs so many ranks through launch/local.py.
# With several ranks launch/preflight.py checks the machine first; PREFLIGHT=0 leaves that out.
# DRY_RUN=1 prints the command instead. Returns the exit code of train_dpo.py (README.md has the list).
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

procs=1
if [[ "${1:-}" == -n ]]; then
    procs="${2:-}"
    [[ "$procs" =~ ^[1-9][0-9]*$ ]] || die "-n takes the number of processes, at least 1, not '$procs'"
    shift 2
fi

rank_environment "$procs" --alone
command=("$PYTHON")
if ((procs > 1)); then command+=("$ROOT/launch/local.py" -n "$procs"); fi
command+=("$ROOT/train_dpo.py" "$@")

if [[ "$DRY_RUN" == 1 ]]; then
    printf 'OMP_NUM_THREADS=%q' "$OMP_NUM_THREADS"
    printf ' %q' "${command[@]}"
    printf '\n'
    exit 0
fi
# An environment that the user has activated is taken as it is; our own is made on the first run.
if [[ -z "${VIRTUAL_ENV:-}" ]]; then setup_environment; fi
remove_dead_build_locks
if ((procs > 1)) && [[ "${PREFLIGHT:-1}" == 1 ]]; then
    "$PYTHON" "$ROOT/launch/local.py" -n "$procs" -m launch.preflight "$@"
fi
exec "${command[@]}"
