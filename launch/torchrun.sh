#!/usr/bin/env bash
# Train with torchrun, on one machine or on many; type the same command on each of them:
#
#   launch/torchrun.sh --gpus 8 [--config FILE] [flags of train_dpo.py]
#   launch/torchrun.sh --nodes 4 --gpus 8 --master node01:29500 [--config FILE] [flags of train_dpo.py]
#
# --gpus is the number of ranks per node. --master names one of the nodes; all meet there (c10d), in any order.
# --restarts K (default 3): after a crash all nodes start again from the newest checkpoint, K times at most.
# SIGTERM, SIGUSR1 or Ctrl-C on any node: all ranks save and stop, exit code 75. DRY_RUN=1 prints the commands.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

nodes=1 gpus='' master='' restarts=3
while (($# > 0)); do
    case "$1" in
        --nodes) nodes="${2-}" ;;
        --gpus) gpus="${2-}" ;;
        --master) master="${2-}" ;;
        --restarts) restarts="${2-}" ;;
        -h | --help) usage ;;
        *) break ;;
    esac
    shift $(($# > 1 ? 2 : 1))
done
require_count --nodes "$nodes"
require_count --gpus "${gpus:-missing}"
require_count --restarts "$restarts" 0
[[ "$nodes" == 1 || -n "$master" ]] || die "--nodes $nodes needs --master HOST[:PORT]: the node where all meet"
parse_master "${master:-localhost:29500}"
alone=()
if ((nodes == 1)); then
    alone=(--alone)
else
    export DPO_MEETING="$MASTER_ADDR:$MASTER_PORT" # preflight looks whether it is free
fi
rank_environment "$gpus" "${alone[@]}"
flags=("$@")

torchrun_command() { # preflight or train
    local port="$MASTER_PORT" script=("$ROOT/train_dpo.py") endpoint=localhost:0 # 0: a free one, on one node
    if [[ "$1" == preflight ]]; then port=$((MASTER_PORT + 1)) script=(-m launch.preflight); fi
    if ((nodes > 1)); then endpoint="$MASTER_ADDR:$port"; fi
    # No restarts by torchrun itself: it would start ranks again that have stopped on request or refused the config.
    printf '%s\0' "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts 0 \
        --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "dpo-$1" "${script[@]}" "${flags[@]}"
}

run_torchrun() { # preflight or train
    local command
    mapfile -d '' -t command < <(torchrun_command "$1")
    run_launcher "${command[@]}"
}

if [[ "$DRY_RUN" == 1 ]]; then
    mapfile -d '' -t command < <(torchrun_command train)
    for ((node = 0; node < nodes; node++)); do
        echo "# node $node of $nodes: $gpus of the ranks 0 to $((nodes * gpus - 1)); torchrun settles which"
        show "${command[@]}"
    done
    exit 0
fi
if [[ -z "${VIRTUAL_ENV:-}" ]]; then setup_environment; fi
remove_dead_build_locks
require_address "$MASTER_ADDR"
find_run_dir "${flags[@]}"
supervise "$restarts" run_torchrun
