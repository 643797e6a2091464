#!/usr/bin/env bash
# The one owner of the Python environment.
#
#   launch/setup.sh [--dev]      make the environment, or check in a moment that it is still right
#   source launch/setup.sh       for other scripts: defines ROOT, PYTHON, die and setup_environment [--dev]
#
# Works from any directory, with Python 3.11 to 3.13 and pip's own settings for a mirror (PIP_INDEX_URL, pip.conf).
# Interrupted, it goes on where it was: pip keeps what it has fetched and installed.
# Uses the active virtual environment, else <repository>/.venv, which it makes. --dev adds requirements-dev.txt.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VIRTUAL_ENV:-$ROOT/.venv}"
PYTHON="$VENV/bin/python"
SETUP_LOG="$ROOT/.cache/setup.log"
# Our own folder: by default every project of a user shares ~/.cache/torch_extensions and its locks.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$ROOT/.cache/torch_extensions}"

die() { # message [exit code]
    echo "error: $1" >&2
    exit "${2:-2}"
}

say() { echo "setup: $1" >&2; }

base_python() { # the name of a Python that can make our environment; one that the tests have run on, if there is one
    local name newest
    for newest in 3.13 9; do
        for name in python3 python3.13 python3.12 python3.11; do
            if "$name" - "$newest" >/dev/null 2>&1 <<<"$USABLE"; then
                echo "$name"
                return
            fi
        done
    done
    die "no Python 3.11 or newer with the venv module was found; install one (Debian, Ubuntu: apt-get install python3 python3-venv)"
}
USABLE='
import ensurepip, sys, venv
newest = tuple(map(int, sys.argv[1].split(".")))
sys.exit(not (3, 11) <= sys.version_info[:2] <= newest)'

wanted() { # [--dev]: the text that decides whether the environment is up to date
    cat "$ROOT/requirements.txt"
    if [[ "${1:-}" == --dev ]]; then cat "$ROOT/requirements-dev.txt"; fi
}

up_to_date() { # [--dev]: an environment with the development requirements serves both
    local kind
    [[ -x "$PYTHON" ]] || return 1
    for kind in "${1:-}" --dev; do
        if [[ -f "$VENV/.dpo-requirements$kind" && "$(wanted "$kind")" == "$(<"$VENV/.dpo-requirements$kind")" ]]; then
            return 0
        fi
    done
    return 1
}

pip_install() { # what it is, then pip's arguments
    say "installing $1"
    PIP_PROGRESS_BAR=off "$PYTHON" -m pip install --disable-pip-version-check --no-input "${@:2}" 2>&1 |
        tee -a "$SETUP_LOG" | large_downloads >&2 && return
    grep -E '^ *(ERROR|error)' "$SETUP_LOG" | tail -n 3 >&2 || true
    die "pip could not install $1; is the package index reachable? The whole story is in $SETUP_LOG"
}

large_downloads() { # pip's words on files of 10 MB and more, as they come: what is fetched, and how large it is
    local line
    while IFS= read -r line; do
        if [[ "$line" =~ Downloading\ ([^[:space:]]+)\ \(([0-9]{2,}(\.[0-9]+)?\ MB|[0-9.]+\ GB)\) ]]; then
            say "  fetching ${BASH_REMATCH[1]##*/} (${BASH_REMATCH[2]})" 2>&1
        fi
    done
}

pinned() { # name: its line of requirements.txt, without the comment
    local line
    line="$(grep -E "^$1\b" "$ROOT/requirements.txt" | sed 's/ *#.*//')" || die "requirements.txt does not name $1"
    echo "$line"
}

make_venv() {
    local base
    [[ -z "${VIRTUAL_ENV:-}" ]] || die "the active environment $VENV has no working pip; repair it, or deactivate it"
    base="$(base_python)"
    "$base" -m venv --clear "$VENV" >>"$SETUP_LOG" 2>&1 || die "could not make $VENV; see $SETUP_LOG"
}

install_requirements() { # [--dev]
    local torch deepspeed files=(-r "$ROOT/requirements.txt")
    torch="$(pinned torch)" deepspeed="$(pinned deepspeed)"
    if [[ "${1:-}" == --dev ]]; then files+=(-r "$ROOT/requirements-dev.txt"); fi
    : >"$SETUP_LOG"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
    say "in $VENV, once; what pip says goes to $SETUP_LOG"
    # DeepSpeed comes as source and its build asks the installed torch which operators fit, so the order matters.
    pip_install "$torch (some minutes the first time)" "$torch" setuptools wheel packaging ninja py-cpuinfo
    pip_install "$deepspeed" --no-build-isolation "$deepspeed"
    pip_install "the other requirements" "${files[@]}"
    wanted "${1:-}" >"$VENV/.dpo-requirements${1:-}"
}

# A build of a DeepSpeed operator that is killed leaves a file `lock`, and every later run waits for it for ever without
# a word. torch's baton keeps the file open while it builds, so a lock that no process has open is a dead one.
remove_dead_build_locks() {
    local lock
    [[ -d "$TORCH_EXTENSIONS_DIR" && -d /proc/self/fd ]] || return 0
    while IFS= read -r lock; do
        if [[ -z "$(find /proc/[0-9]*/fd -lname "$lock" -print -quit 2>/dev/null)" ]]; then
            say "removing $lock, left behind by a build that was killed"
            rm -f "$lock"
        fi
    done < <(find "$(cd "$TORCH_EXTENSIONS_DIR" && pwd -P)" -name lock -type f)
}

setup_environment() { # [--dev]
    local option="${1:-}"
    [[ -z "$option" || "$option" == --dev ]] || die "setup takes --dev or nothing, not '$option'"
    remove_dead_build_locks
    if up_to_date "$option"; then return; fi
    mkdir -p "$ROOT/.cache"
    (
        # A second start waits here for the first one, and then finds the work done. (macOS has no flock.)
        if command -v flock >/dev/null; then flock 9; fi
        if ! up_to_date "$option"; then install_requirements "$option"; fi
    ) 9>"$ROOT/.cache/setup.lock"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    setup_environment "$@"
    say "ready: $PYTHON"
fi
