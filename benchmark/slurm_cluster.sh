#!/usr/bin/env bash
# A SLURM cluster of this one machine, in a temporary folder, to try grids on. Needs root and the
# packages slurm-wlm and munge.
#
#     benchmark/slurm_cluster.sh start /tmp/cluster     # then: export SLURM_CONF=/tmp/cluster/slurm.conf
#     benchmark/slurm_cluster.sh stop /tmp/cluster
set -euo pipefail

usage() {
    echo "usage: $0 start|stop FOLDER" >&2
    exit 2
}

start() {
    mkdir -p "$folder"/{state,spool,munge}
    chmod 755 "$folder" # munge wants folders that only root can write
    chmod 700 "$folder/munge"
    head -c 1024 /dev/urandom >"$folder/munge/key"
    chmod 400 "$folder/munge/key"
    mkdir -p "$folder/socket"
    chmod 755 "$folder/socket"
    munged --force --key-file="$folder/munge/key" --socket="$folder/socket/munge" \
        --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    local host cpus memory
    host=$(hostname -s)
    cpus=$(nproc)
    memory=$(awk '/MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)
    cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/socket/munge
CryptoType=crypto/munge
SlurmctldPort=$((20000 + RANDOM % 10000))
SlurmdPort=$((30000 + RANDOM % 10000))
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=10
NodeName=$host CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2
CONF
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    slurmd
    for _ in $(seq 60); do
        if [[ $(sinfo --noheader --format %T 2>/dev/null) == *idle* ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    echo "the cluster does not start; see $folder/slurmctld.log and slurmd.log" >&2
    stop
    exit 1
}

stop() {
    local file
    for file in slurmd.pid slurmctld.pid munge/pid; do
        if [[ -f "$folder/$file" ]]; then
            kill "$(cat "$folder/$file")" 2>/dev/null || true
        fi
    done
}

[[ $# -eq 2 ]] || usage
folder=$(realpath -m "$2")
case $1 in
start) start ;;
stop) stop ;;
*) usage ;;
esac
