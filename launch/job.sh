# shellcheck shell=bash
# What all launchers share: the one place that decides the environment of ranks, how many there are and where they meet,
# how a request to stop reaches them, and what the end of a job means. Sourced by all launchers.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

DRY_RUN="${DRY_RUN:-0}"
DECIDED=() # NAME=VALUE of what rank_environment has set
HOSTS=() # of a job that this machine starts through ssh; empty: the ranks here are the only ones that we can reach
# Every rank carries this word in its environment, so that signals go to the ranks of this job and to nothing else.
export DPO_JOB="${DPO_JOB:-$$-$RANDOM$RANDOM}"

usage() { # prints the comment at the top of the launcher
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit 0
}

require_count() { # option value [least]
    if [[ "$2" =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($2 >= ${3:-1})); then return; fi
    die "$1 takes a whole number, at least ${3:-1}, not ${2@Q}"
}

require_host() { # value, where it stands: ssh and pdsh would take a leading dash for an option, a shell much else for code
    [[ "$1" =~ ^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$ ]] || die "$2: ${1@Q} is no host name"
}

# Sets MASTER_ADDR and MASTER_PORT from --master HOST[:PORT].
parse_master() { # value
    local host="${1%%:*}" port=29500
    if [[ "$1" == *:* ]]; then port="${1#*:}"; fi
    require_host "$host" --master
    [[ "$port" =~ ^[1-9][0-9]{3,4}$ && $((port)) -ge 1024 && $((port)) -lt 65535 ]] || die "--master: port ${port@Q} is not in 1024 ... 65534"
    # shellcheck disable=SC2034 # the launchers read them
    MASTER_ADDR="$host" MASTER_PORT="$port"
}

require_address() { # host: torchrun would look for one that does not exist for minutes
    getent ahosts "$1" >/dev/null || die "--master: host $1 does not resolve to an address on $(hostname)"
}

# What every rank finds in its environment: launch/environment.py decides, and what the user has set stays.
rank_environment() { # ranks per node [--threads N] [--alone]
    local pair
    while IFS= read -r -d '' pair; do export "${pair?}" && DECIDED+=("$pair"); done < <(
        # Our own Python may not be made yet.
        python3 "$ROOT/launch/environment.py" "$@" || "$PYTHON" "$ROOT/launch/environment.py" "$@"
    )
    [[ -n "${OMP_NUM_THREADS:-}" ]] || die "launch/environment.py did not run: is there a python3 on PATH?"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" && DECIDED+=("PYTHONPATH=$PYTHONPATH")
}

# Names of the variables that ranks on other machines need as well. Tokens and keys would show in command lines there.
rank_variables() {
    compgen -e | grep -E '^(OMP_NUM_THREADS|DPO_(JOB|HOSTS|MEETING)|PYTHON(PATH|UNBUFFERED)|DS_ACCELERATOR|(NCCL|GLOO|TORCH|HF|TOKENIZERS|TRANSFORMERS|CUDA_DEVICE|XDG_CACHE)_.*)$' |
        grep -vE 'TOKEN$|KEY|SECRET|PASSWORD'
}

show() { # command: prints it, quoted for a shell, after the variables that we set
    local pair
    for pair in "${DECIDED[@]}"; do printf '%s=%q ' "${pair%%=*}" "${pair#*=}"; done
    printf '%q ' "$@"
    printf '\n'
}

run_status() { "$PYTHON" -m launch.status "$@"; }

# Where a relative run.dir lies, and a config that is wrong ends here, in one line, before anything is started.
find_run_dir() { # flags of train_dpo.py
    RUN_DIR="$(run_status where "$@")" || exit 2
}

signal_ranks() { # signal name: to all ranks of this job that we can reach
    local command=("$PYTHON" -m launch.signal_ranks "$DPO_JOB" "$1")
    if ((${#HOSTS[@]} == 0)); then
        "${command[@]}"
    else
        PDSH_RCMD_TYPE=ssh pdsh -t 10 -w "$(IFS=,; echo "${HOSTS[*]}")" "PYTHONPATH=$ROOT ${command[*]}" || true
    fi
}

REQUESTS=0 INTERRUPTS=0 LAUNCHER='' REPEATER=''
# Launchers turn a signal into a kill of some ranks. The ranks themselves agree, save at the end of the step and exit 75.
request_stop() { # [INT]
    REQUESTS=$((REQUESTS + 1))
    if [[ "${1:-}" == INT ]]; then INTERRUPTS=$((INTERRUPTS + 1)); fi
    if ((INTERRUPTS > 1)); then # a second Ctrl-C ends everything at once
        signal_ranks KILL
        if [[ -n "$LAUNCHER" ]]; then kill -KILL -- "-$LAUNCHER" 2>/dev/null || true; fi
    elif ((REQUESTS == 1)); then # again and again: ranks that are only starting do not hear it, the others do not mind
        while :; do
            signal_ranks USR1
            sleep 2
        done &
        REPEATER=$!
    fi
}

# Runs a launcher in a session of its own (Ctrl-C reaches it through us only); returns its exit code.
run_launcher() { # command
    local code=0
    setsid "$@" &
    LAUNCHER=$!
    while :; do # wait returns early at every trapped signal
        wait "$LAUNCHER" && code=0 || code=$?
        kill -0 "$LAUNCHER" 2>/dev/null || break
    done
    LAUNCHER=''
    if [[ -n "$REPEATER" ]]; then kill "$REPEATER" 2>/dev/null || true; fi
    signal_ranks KILL # what a launcher that died has left behind
    return "$code"
}

# Preflight, then training, started again after a crash while checkpoints advance. Returns the trainer's exit code.
# Call as: supervise RESTARTS RUN_FUNCTION; the function takes "preflight" or "train" and runs it on all nodes.
supervise() { # restarts, function
    local restart since before code
    trap request_stop TERM USR1 HUP
    trap 'request_stop INT' INT
    if [[ "${PREFLIGHT:-1}" == 1 ]] && ! "$2" preflight && ((REQUESTS == 0)); then
        die "preflight did not pass (see above); training was not started"
    fi
    for ((restart = 0; ; restart++)); do
        since="$(run_status attempt "$RUN_DIR")" before="$(run_status progress "$RUN_DIR")"
        ((REQUESTS == 0)) || return 75
        "$2" train && code=0 || code=$?
        run_status end "$RUN_DIR" --since "$since" --code "$code" --requests "$REQUESTS" && code=0 || code=$?
        ((code == 1 || code == 4)) || return "$code" # 0 done, 2 and 3 would come again, 75 is the user's wish
        ((restart < $1 && REQUESTS == 0)) || return "$code"
        if [[ "$(run_status progress "$RUN_DIR")" == "$before" && "$restart" -gt 0 ]]; then
            echo "error: two starts in a row ended without a new checkpoint (newest step: $before); not started again" >&2
            return "$code"
        fi
        echo "restart $((restart + 1)) of $1 after exit code $code" >&2
        sleep 2
    done
}
