#!/usr/bin/env bash
# The launchers on two real cluster nodes on this machine: SLURM, ssh, torchrun's rendezvous. tests/run.sh --all calls it.
#
#   tests/cluster/run.sh [arguments of pytest]
#
# Installs Debian's packages where they are missing, starts the nodes (nodes.sh), runs the tests and takes all of it down again.
# Says why, and ends well, where it cannot run: no root, no apt, no package index, no network namespaces.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../launch/setup.sh"
cd "$ROOT"

packages=(slurmctld slurmd slurm-client munge pdsh openssh-server openssh-client iproute2 util-linux)

skip() { # why
    echo "tests/cluster skipped: $1"
    exit 0
}

install_packages() {
    local package own_policy='' missing=()
    for package in "${packages[@]}"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    ((${#missing[@]} > 0)) || return 0
    echo "tests/cluster: installing ${missing[*]}"
    # policy-rc.d: the packages' own services are not wanted, even where there is an init that would start them.
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
        own_policy=/usr/sbin/policy-rc.d
    fi
    if ! DEBIAN_FRONTEND=noninteractive apt_get "${missing[@]}" >/dev/null 2>&1; then
        rm -f $own_policy
        skip "apt-get could not install ${missing[*]}: no package index in reach?"
    fi
    rm -f $own_policy
}

apt_get() { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; }

((EUID == 0)) || skip "needs root"
command -v apt-get >/dev/null || skip "needs Debian's packages, and there is no apt-get"
install_packages
unshare --net --uts --mount --pid --fork true 2>/dev/null || skip "this machine allows no namespaces"
exec 9>/run/dpo-test-cluster.lock # the nodes have fixed names
flock 9
# One that was killed has left its nodes behind.
if ip netns list | grep -q '^dpo-test-'; then "$ROOT/tests/cluster/nodes.sh" down "$(readlink -m /run/dpo-test-cluster)" 9>&-; fi

DPO_TEST_CLUSTER="$(mktemp -d)"
export DPO_TEST_CLUSTER
ln -sfn "$DPO_TEST_CLUSTER" /run/dpo-test-cluster
clean_up() {
    "$ROOT/tests/cluster/nodes.sh" down "$DPO_TEST_CLUSTER" 9>&- || true
    rm -rf "$DPO_TEST_CLUSTER" /run/dpo-test-cluster
}
trap clean_up EXIT
trap 'exit 130' INT TERM
if ! "$ROOT/tests/cluster/nodes.sh" up "$DPO_TEST_CLUSTER" 9>&-; then
    # Without control groups v1 it is no news that Debian 12's SLURM does not start; with them it is a failure.
    mountpoint -q /sys/fs/cgroup/freezer || skip "SLURM did not start on this machine, which has no control groups v1"
    exit 1
fi
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false VIRTUAL_ENV="$VENV" PATH="$VENV/bin:$PATH"
"$PYTHON" -m pytest "$@" tests/cluster 9>&-
