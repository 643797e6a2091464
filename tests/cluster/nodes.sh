#!/usr/bin/env bash
# Two cluster nodes on one machine: a network and a hostname of its own each, real munge, slurmctld, slurmd and sshd.
#
#   tests/cluster/nodes.sh up DIR      DIR/on n1 COMMAND runs a command on a node, DIR/hostfile names both for DeepSpeed
#   tests/cluster/nodes.sh down DIR
#
# Needs root, and Debian's slurmctld slurmd slurm-client munge pdsh openssh-server iproute2. No systemd. Each node claims eight
# cores, 500 GB and two GPUs (which are /dev/null), so that job scripts for real nodes run unchanged.
set -euo pipefail
action="${1:?usage: nodes.sh up|down DIR}" dir="${2:?usage: nodes.sh up|down DIR}"
prefix=dpo-test network=10.77.0

write_slurm_conf() {
    cat >"$dir/slurm.conf" <<EOF
ClusterName=dpotest
SlurmctldHost=n1
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MailProg=/bin/true
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=$1
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobs.txt
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=20
SlurmdTimeout=10
MinJobAge=600
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeAddr=$network.1 CPUs=8 RealMemory=512000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeAddr=$network.2 CPUs=8 RealMemory=512000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
EOF
}

write_config() {
    local tracking=proctrack/linuxproc gpu
    echo 'CgroupPlugin=cgroup/v1' >"$dir/cgroup.conf"
    if mountpoint -q /sys/fs/cgroup/freezer && [[ -w /sys/fs/cgroup/freezer ]]; then # as on real clusters
        tracking=proctrack/cgroup
        printf 'CgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n' >>"$dir/cgroup.conf"
    fi
    write_slurm_conf "$tracking"
    for gpu in 0 1; do [[ -e "$dir/gpu$gpu" ]] || mknod "$dir/gpu$gpu" c 1 3; done
    echo "NodeName=n[1-2] Name=gpu File=$dir/gpu[0-1]" >"$dir/gres.conf"
    printf '127.0.0.1 localhost\n%s.1 n1\n%s.2 n2\n' "$network" "$network" >"$dir/hosts"
    printf 'n1 slots=1\nn2 slots=1\n' >"$dir/hostfile"
    # `on` keeps the outer /sys, which `ip netns exec` would hide together with the control groups.
    cat >"$dir/on" <<EOF
#!/bin/sh
node=\$1; shift
export SLURM_CONF=$dir/slurm.conf PATH=$dir/bin:\$PATH
exec nsenter --net=/run/netns/$prefix-\$node --wdns="\$PWD" unshare --uts --mount sh -c \\
    'hostname "\$0"; mount --bind $dir/hosts /etc/hosts; exec "\$@"' "\$node" "\$@"
EOF
    chmod +x "$dir/on"
}

start_network() {
    local node
    for node in n1 n2; do
        ip netns add "$prefix-$node"
        ip -n "$prefix-$node" link set lo up
    done
    ip link add eth0 netns "$prefix-n1" type veth peer name eth0 netns "$prefix-n2"
    for node in n1 n2; do
        ip -n "$prefix-$node" addr add "$network.${node#n}/24" dev eth0
        ip -n "$prefix-$node" link set eth0 up
    done
}

start_slurm() {
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
    munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    "$dir/on" n1 slurmctld
    "$dir/on" n1 slurmd -N n1
    "$dir/on" n2 slurmd -N n2
}

start_sshd() { # with keys of its own; neither /root/.ssh nor /etc/ssh is used or changed
    local node
    ssh-keygen -q -t ed25519 -N '' -f "$dir/ssh/host"
    ssh-keygen -q -t ed25519 -N '' -f "$dir/ssh/id"
    cp "$dir/ssh/id.pub" "$dir/ssh/authorized_keys"
    printf '%s\n' "Port 22" "HostKey $dir/ssh/host" "AuthorizedKeysFile $dir/ssh/authorized_keys" 'StrictModes no' \
        'PermitRootLogin prohibit-password' 'PasswordAuthentication no' 'UsePAM no' 'UseDNS no' 'PidFile none' >"$dir/ssh/sshd_config"
    printf '%s\n' 'Host *' "  IdentityFile $dir/ssh/id" '  UserKnownHostsFile /dev/null' '  StrictHostKeyChecking no' \
        '  LogLevel ERROR' >"$dir/ssh/config"
    printf '#!/bin/sh\nexec /usr/bin/ssh -F %s/ssh/config "$@"\n' "$dir" >"$dir/bin/ssh"
    chmod +x "$dir/bin/ssh"
    mkdir -p /run/sshd
    for node in n1 n2; do # a PID namespace: what a launcher kills by name on a node must be on that node
        "$dir/on" "$node" unshare --pid --fork --mount-proc --kill-child /usr/sbin/sshd -D -f "$dir/ssh/sshd_config" \
            -E "$dir/ssh/sshd.$node.log" </dev/null >/dev/null 2>&1 &
        echo $! >>"$dir/ssh/pids"
    done
}

wait_until() { # what, command
    local try
    for try in {1..100}; do
        if timeout 5 "${@:2}" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    echo "error: $1 did not come up after $try tries; see the logs in $dir" >&2
    exit 1
}

up() {
    mkdir -p "$dir"/{state,spool.n1,spool.n2,munge,ssh,bin}
    chmod 755 "$dir" "$dir/munge"
    write_config
    start_network
    start_slurm
    start_sshd
    wait_until SLURM "$dir/on" n1 srun -N2 -n2 -t1 true # sinfo may call a node idle that is not there
    wait_until 'sshd on n1' "$dir/on" n1 ssh n1 true
    wait_until 'sshd on n2' "$dir/on" n1 ssh n2 true
}

down() {
    local file pid node
    "$dir/on" n1 scancel -u root 2>/dev/null || true
    "$dir/on" n1 scontrol shutdown 2>/dev/null || true
    sleep 1
    for file in "$dir"/slurmctld.pid "$dir"/slurmd.n1.pid "$dir"/slurmd.n2.pid "$dir"/munge/pid; do
        if [[ -f "$file" ]]; then kill "$(<"$file")" 2>/dev/null || true; fi
    done
    while read -r pid; do # `unshare --fork` ignores TERM; --kill-child takes sshd and all it started along
        if [[ "$(cat "/proc/$pid/comm" 2>/dev/null)" == unshare ]]; then kill -9 "$pid"; fi
    done < <(cat "$dir/ssh/pids" 2>/dev/null)
    sleep 0.3
    for node in n1 n2; do
        ip netns del "$prefix-$node" 2>/dev/null || true
        find "/sys/fs/cgroup/freezer/slurm_$node" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    done
}

case "$action" in
    up) up ;;
    down) down ;;
    *) echo "error: up or down, not '$action'" >&2 && exit 2 ;;
esac
