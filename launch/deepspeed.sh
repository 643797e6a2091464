#!/usr/bin/env bash
# Train with DeepSpeed's launcher (for --parallel.engine deepspeed and for fsdp2 alike).
#
#   launch/deepspeed.sh --gpus 8 [--config FILE] [flags of train_dpo.py]                one machine
#   launch/deepspeed.sh --hostfile FILE [--master HOST[:PORT]] [--config FILE] [flags]  all nodes from here, by pdsh and ssh
#   launch/deepspeed.sh --nodes 4 --gpus 8 --master HOST[:PORT] --node-rank R [...]     no ssh: type it on each node
#
# A line of the hostfile is `HOST slots=GPUS`. --restarts K (default 3): after a crash the newest checkpoint is taken up
# again, K times at most. SIGTERM, SIGUSR1 or Ctrl-C: all ranks save and stop, exit code 75. DRY_RUN=1 prints the commands.
set -euo pipefail
# shellcheck source=launch/job.sh
source "$(dirname "${BASH_SOURCE[0]}")/job.sh"

nodes=1 gpus='' master='' node_rank='' hostfile='' restarts=3
while (($# > 0)); do
    case "$1" in
        --nodes) nodes="${2-}" ;;
        --gpus) gpus="${2-}" ;;
        --master) master="${2-}" ;;
        --node-rank) node_rank="${2-}" ;;
        --hostfile) hostfile="${2-}" ;;
        --restarts) restarts="${2-}" ;;
        -h | --help) usage ;;
        *) break ;;
    esac
    shift $(($# > 1 ? 2 : 1))
done
require_count --restarts "$restarts" 0
flags=("$@")

# Sets HOSTS, nodes and gpus. DeepSpeed takes a number of slots on trust and waits for ever for ranks that never start.
read_hostfile() { # file
    local line host slots number=0 where
    [[ -f "$1" ]] || die "--hostfile ${1@Q}: no such file; its lines are \`HOST slots=GPUS\`"
    while IFS= read -r line || [[ -n "$line" ]]; do
        number=$((number + 1)) where="$1:$number"
        line="${line%%#*}"
        [[ "$line" =~ [^[:space:]] ]] || continue
        [[ "$line" =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([^[:space:]]*)[[:space:]]*$ ]] || die "$where: ${line@Q} is not \`HOST slots=GPUS\`"
        host="${BASH_REMATCH[1]}" slots="${BASH_REMATCH[2]}"
        require_host "$host" "$where"
        require_count "$where: slots" "$slots"
        [[ " ${HOSTS[*]} " != *" $host "* ]] || die "$where: host $host is listed twice"
        [[ "${gpus:-$slots}" == "$slots" ]] || die "$where: $slots slots, but ${gpus} before: every node needs as many"
        gpus="$slots" HOSTS+=("$host")
    done <"$1"
    nodes="${#HOSTS[@]}"
    ((nodes > 0)) || die "--hostfile ${1@Q} names no host"
}

# Over pdsh words pass through a remote shell, and DeepSpeed's own quoting lets it run \$(...) in them. What we add is what
# that quoting lacks, so that the rank gets each word as it was typed.
quote_for_pdsh() { # word
    local word="$1"
    if [[ "$word" =~ ^[A-Za-z0-9_@+=:,./-]+$ ]]; then printf '%s' "$word"; return; fi
    word="${word//%/%%}" # pdsh's own escapes
    if [[ "$word" == *' '* ]]; then # DeepSpeed puts "..." around it and a backslash before "
        word="${word//\\/\\\\}" word="${word//\$/\\\$}" word="${word//\`/\\\`}"
    else
        word="'${word//\'/\'\\\'\'}'"
    fi
    printf '%s' "$word"
}

deepspeed_command() { # preflight or train
    local port="$MASTER_PORT" script=("$ROOT/train_dpo.py") where=() word words=("${flags[@]}")
    if [[ "$1" == preflight ]]; then port=$((MASTER_PORT + 1)) script=(--module launch.preflight); fi
    case "$path" in
        one) where=(--num_nodes 1 --num_gpus "$gpus") ;;
        pdsh) where=(--hostfile "$hostfile" --launcher pdsh --force_multi --no_ssh_check --master_addr "$MASTER_ADDR") ;;
        no_ssh) where=(--hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --master_addr "$MASTER_ADDR") ;;
    esac
    if [[ "$path" == pdsh ]]; then
        words=()
        for word in "${flags[@]}"; do words+=("$(quote_for_pdsh "$word")"); done
    fi
    printf '%s\0' "$PYTHON" -m deepspeed.launcher.runner --log_level warning "${where[@]}" --master_port "$port" "${script[@]}" "${words[@]}"
}

run_deepspeed() { # preflight or train
    local command
    mapfile -d '' -t command < <(deepspeed_command "$1")
    run_launcher "${command[@]}"
}

choose_path() {
    local word
    if [[ -n "$hostfile" ]]; then
        read_hostfile "$hostfile"
        parse_master "${master:-${HOSTS[0]}}"
        path=pdsh
        for word in "${flags[@]}"; do
            [[ "$word" != *[$'\n\r']* ]] || die "a flag with a line break cannot be passed through ssh: ${word@Q}"
        done
        return
    fi
    require_count --nodes "$nodes"
    require_count --gpus "${gpus:-missing}"
    if ((nodes == 1)); then
        parse_master "${master:-localhost}"
        path=one alone=(--alone)
        return
    fi
    [[ -n "$master" ]] || die "--nodes $nodes needs --hostfile FILE, or --master HOST[:PORT] and --node-rank R on each node"
    parse_master "$master"
    # DeepSpeed wants names for the nodes, though it uses only --master_addr.
    hostfile="$ROOT/.cache/hostfiles/${nodes}x$gpus" path=no_ssh
}

# Variables reach the nodes through DS_ENV_FILE; DeepSpeed puts "..." around a value and quotes nothing inside. What the user
# has in such a file of his own goes along.
write_environment() { # file, the user's files
    local name file
    for file in "${@:2}"; do
        if [[ -f "$file" ]]; then grep '=' "$file" || true; fi
    done >"$1"
    for name in $(rank_variables); do
        [[ "${!name}" =~ ^[A-Za-z0-9_@%+=:,./^-]*$ ]] || die "$name=${!name@Q} cannot be passed to other nodes through ssh: use letters, digits and _@%+=:,./-"
        printf '%s=%s\n' "$name" "${!name}"
    done >>"$1"
}

prepare_pdsh() {
    local name host users=("$HOME/.deepspeed_env" .deepspeed_env "${DS_ENV_FILE:-}")
    command -v pdsh >/dev/null || die "pdsh is not installed (Debian, Ubuntu: apt-get install pdsh); or use --nodes, --master and --node-rank"
    for name in PWD ROOT PYTHON; do
        [[ "${!name}" =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] || die "$name=${!name@Q}: pdsh needs a path of letters, digits and _@+=:,./-"
    done
    for host in "${HOSTS[@]}"; do
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true </dev/null || die "host $host cannot be reached by ssh without a password (tried: ssh $host true)" 4
    done
    DS_ENV_FILE="$(mktemp)"
    export DS_ENV_FILE
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    write_environment "$DS_ENV_FILE" "${users[@]}"
}

write_names() { # the hostfile of the path without ssh
    mkdir -p "$ROOT/.cache/hostfiles"
    for ((node = 0; node < nodes; node++)); do echo "node-$node slots=$gpus"; done >"$hostfile.$$"
    mv "$hostfile.$$" "$hostfile"
}

show_commands() {
    local command first="${node_rank:-0}" last="${node_rank:-$((nodes - 1))}"
    if [[ "$path" == pdsh ]]; then echo "# from here, on all of ${HOSTS[*]} in this order: ranks 0 to $((nodes * gpus - 1)), $gpus on each"; fi
    if [[ "$path" == pdsh ]]; then first=0 last=0; fi
    for ((node_rank = first; node_rank <= last; node_rank++)); do
        if [[ "$path" != pdsh ]]; then echo "# node $node_rank of $nodes: ranks $((node_rank * gpus)) to $(((node_rank + 1) * gpus - 1))"; fi
        if [[ "$path" == no_ssh ]]; then echo "# $hostfile has $nodes lines, node-0 slots=$gpus to node-$((nodes - 1)) slots=$gpus"; fi
        mapfile -d '' -t command < <(deepspeed_command train)
        show "${command[@]}"
    done
}

alone=()
choose_path
rank_environment "$gpus" "${alone[@]}"
# Preflight meets at the port after that of the training, looks whether that one is free, and names nodes by their order.
export DPO_MEETING="$MASTER_ADDR:$MASTER_PORT"
if ((${#HOSTS[@]} > 0)); then DPO_HOSTS="$(IFS=,; echo "${HOSTS[*]}")" && export DPO_HOSTS; fi
if [[ -n "$node_rank" ]]; then
    [[ "$path" == no_ssh ]] || die "--node-rank belongs to --nodes and --master, without a hostfile"
    require_count --node-rank "$node_rank" 0
    ((node_rank < nodes)) || die "--node-rank $node_rank: the nodes are 0 to $((nodes - 1))"
fi
if [[ "$DRY_RUN" == 1 ]]; then
    show_commands
    exit 0
fi
[[ "$path" != no_ssh || -n "$node_rank" ]] || die "--nodes $nodes: say which one this is with --node-rank 0 ... $((nodes - 1))"
if [[ -z "${VIRTUAL_ENV:-}" ]]; then setup_environment; fi
remove_dead_build_locks
require_address "$MASTER_ADDR"
find_run_dir "${flags[@]}"
if [[ "$path" == pdsh ]]; then prepare_pdsh; fi
if [[ "$path" == no_ssh ]]; then write_names; fi
supervise "$restarts" run_deepspeed
