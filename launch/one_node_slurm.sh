#!/usr/bin/env bash
# Start SLURM on this machine alone, without systemd, to try a job script before a cluster sees it.
#
#     launch/one_node_slurm.sh start FOLDER    # then: export SLURM_CONF=FOLDER/slurm.conf
#     launch/one_node_slurm.sh stop FOLDER
#
# Wants Debian's slurm-wlm and munge (apt-get install slurm-wlm munge), and root. All that it writes is in
# FOLDER, but for Munge's socket folder, which is a new one in /tmp, since a socket's path must be short.
set -euo pipefail

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# = 2 ] || usage
folder=$(mkdir -p "$2" && cd "$2" && pwd)

alive() { # PIDFILE
    [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null
}

stop() {
    if alive "$folder/slurmctld.pid"; then # what still runs would outlive its daemons
        export SLURM_CONF=$folder/slurm.conf
        squeue --noheader --format=%A | xargs --no-run-if-empty scancel
        for _ in $(seq 900); do [ -n "$(squeue --noheader --format=%A)" ] || break; sleep 0.1; done
    fi
    for daemon in slurmctld slurmd munged; do
        if alive "$folder/$daemon.pid"; then
            kill "$(cat "$folder/$daemon.pid")"
            for _ in $(seq 300); do alive "$folder/$daemon.pid" || break; sleep 0.1; done
        fi
    done
    if [ -s "$folder/munge.folder" ]; then rm -rf "$(cat "$folder/munge.folder")" "$folder/munge.folder"; fi
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start() {
    if alive "$folder/slurmctld.pid"; then echo "slurmctld of $folder is running" >&2; exit 1; fi
    local host munge cores
    # `nproc` would count OMP_NUM_THREADS; two at least, so that two ranks have a place
    cores=$(getconf _NPROCESSORS_ONLN)
    if [ "$cores" -lt 2 ]; then cores=2; fi
    host=$(hostname -s)
    munge=$(mktemp -d /tmp/munge.XXXXXX)
    echo "$munge" >"$folder/munge.folder"
    mkdir -p "$folder/state" "$folder/spool"
    mungekey --create --force --keyfile="$munge/key"
    # munged is its own user's, and so are its files
    chmod 755 "$munge"
    chown -R munge: "$munge"
    setpriv --reuid=munge --regid=munge --clear-groups -- munged --force --key-file="$munge/key" \
        --socket="$munge/socket" --pid-file="$munge/pid" --log-file="$munge/log" --seed-file="$munge/seed"
    cp "$munge/pid" "$folder/munged.pid"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
# seconds. By cred_expire, a requeued job begins again after that many, where a cluster waits two minutes
KillWait=60
SchedulerParameters=sched_interval=1,batch_sched_delay=1
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$folder/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 300); do
        if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    echo "no node is idle after 30 seconds; see $folder/slurmctld.log and slurmd.log" >&2
    stop
    exit 1
}

case $1 in start) start ;; stop) stop ;; *) usage ;; esac
