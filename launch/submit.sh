#!/usr/bin/env bash
# Submit a training to SLURM: launch/submit.sh --nodes 4 --gpus 8 --partition P --time 24:00:00 [--config FILE] [flags]
#
# launch/submit.sh --help lists the options; they may stand in a YAML file (--cluster FILE). DRY_RUN=1 submits nothing and
# prints the sbatch command and what the job would run.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

python="$PYTHON"
if [[ ! -x "$python" ]]; then
    if [[ "${DRY_RUN:-0}" == 1 || "${1:-}" == --help ]]; then python="$(base_python)"; else setup_environment; fi
fi
exec "$python" "$ROOT/launch/submit.py" "$@"
