#!/bin/bash
# `launch` on a real Slurm: submit, requeue, preempt, reach the time limit, cancel, finish; and nothing runs twice.
#
#     apt-get install slurm-wlm munge          # Debian's; the script needs root
#     bash tests/cluster/slurm.sh              # from the root of the repository, with its .venv; 10 to 20 minutes
#
# One node, this machine, over the loopback; all files stand in a temporary folder, which is deleted. Runs of a short
# `smoke` by two processes each are compared with the same runs without Slurm.
set -euo pipefail

programs=${PROGRAMS:-$PWD/.venv/bin} # where upcycle-bench is
here=$(mktemp -d /tmp/slurm-XXXXXX)
export SLURM_CONF=$here/slurm.conf UPCYCLE_BENCH_CACHE=$here/cache OMP_NUM_THREADS=1
node=$(hostname -s)

leave() {
    status=$?
    scancel --user=root 2>/dev/null || true
    sleep 3
    for daemon in slurmctld slurmd munged; do
        if [ -f "$here/$daemon.pid" ]; then kill "$(cat "$here/$daemon.pid")"; fi
    done
    if [ $status -ne 0 ]; then tail -n 15 "$here"/work/*/logs/*.log "$here"/slurm*.log || true; fi
    sleep 2
    rm -rf "$here"
    exit $status
}
trap leave EXIT

start_slurm() {
    chmod 711 "$here"
    head -c 1024 /dev/urandom >"$here/munge.key"
    chmod 600 "$here/munge.key"
    munged --key-file="$here/munge.key" --socket="$here/munge.sock" --pid-file="$here/munged.pid" \
        --log-file="$here/munged.log" --seed-file="$here/munge.seed"
    # cred_expire: a requeued job waits as long, and by default two minutes.
    cat >"$SLURM_CONF" <<END
ClusterName=here
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$here/munge.sock,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd.pid
SlurmctldLogFile=$here/slurmctld.log
SlurmdLogFile=$here/slurmd.log
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$node MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE PriorityTier=2 PreemptMode=OFF
END
    mkdir -p "$here/state" "$here/spool" "$here/work"
    slurmctld
    slurmd
    until [ "$(sinfo --noheader --format=%T)" = idle ]; do sleep 1; done
}

launch() { "$programs/upcycle-bench" launch --protocol smoke --set dense.schedule.steps=40 --tasks-per-node 2 "$@"; }
ended() { while [ -n "$(squeue --noheader)" ]; do sleep 2; done; }
until_training() { # the number of an array's job in folder $1
    until grep -q "run 1 of 1" "$1/logs/$2.log" 2>/dev/null && compgen -G "$here/cache/runs/*/checkpoints/step*" >/dev/null; do
        sleep 1
    done
}

four=(--strategy dense,sparse-upcycling --seeds 2 --set train.schedule.steps=60 --set train.checkpoint_every=5)
# Long enough to be at work 80 seconds after its start; on a busy machine a tenth does.
long=(--strategy drop-upcycling --seed 7 --set train.schedule.steps="${LONG_STEPS:-700}" --set train.checkpoint_every=50)
preempted=(--strategy sparse-upcycling --seed 5 --set train.schedule.steps="${LONG_STEPS:-700}" --set train.checkpoint_every=50)
cancelled=(--strategy dense-wide --set train.schedule.steps=500 --set train.checkpoint_every=5)
slurm=(--scheduler slurm --submit --results by-slurm)

start_slurm
cd "$here/work"
echo "== four runs; the second is requeued while it trains"
launch "${four[@]}" "${slurm[@]}" --max-jobs 2 --output four
job=$(cat four/submitted.txt)
until_training four 2
scontrol requeue "${job}_2"
ended

echo "== a run that is longer than its limit of two minutes"
launch "${long[@]}" "${slurm[@]}" --time 2 --signal-before 40 --output long
until grep -q "ended with status" long/logs/1.log 2>/dev/null; do sleep 2; done
scontrol update JobId="$(cat long/submitted.txt)" TimeLimit=120 # once is enough
ended

echo "== a run that makes room for an urgent job while it trains"
launch "${preempted[@]}" "${slurm[@]}" --output preempted
until_training preempted 1
sbatch --wait --partition=urgent --output=urgent.log --wrap 'date -u "+urgent job at %FT%TZ"; sleep 5'
cat urgent.log
ended

echo "== a run that is cancelled while it trains"
launch "${cancelled[@]}" "${slurm[@]}" --output cancelled
until_training cancelled 1
scancel "$(cat cancelled/submitted.txt)"
ended # if it came back, it would end with a record

echo "== the first four again: all are done"
launch "${four[@]}" "${slurm[@]}" --output four 2>/dev/null | tee again.txt
grep -q "^0 of 4 runs are to do" again.txt

echo "== the same without Slurm"
mkdir "$here/cache-local"
cp -r "$here/cache/worlds" "$here/cache-local"
export UPCYCLE_BENCH_CACHE=$here/cache-local
launch "${four[@]}" --scheduler local --jobs 2 --results by-hand --output local >/dev/null
launch "${long[@]}" --scheduler local --results by-hand --output local-long >/dev/null
launch "${preempted[@]}" --scheduler local --results by-hand --output local-preempted >/dev/null

"$programs/python" - <<'END'
import json, pathlib, re

def weights(folder):
    """The weights of each run's records."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*.json")):
        made = json.loads(path.read_text())
        assert made["status"] == "ok" and made["cost"]["world_size"] == 2, path
        found.setdefault((made["strategy"]["name"], made["seeds"]["train"]), []).append(made["hashes"]["weights"])
    return found

by_slurm, by_hand, starts = weights("by-slurm"), weights("by-hand"), {}
for folder in ("four", "long", "preempted"):
    for number, line in enumerate(pathlib.Path(folder, "cells.txt").read_text().splitlines(), start=1):
        log = pathlib.Path(folder, "logs", f"{number}.log").read_text()
        key = (re.search("--strategy ([^ ]+)", line)[1], int(re.search("--train-seed ([0-9]+)", line)[1]))
        starts[key] = (log.count(", start "), re.findall("ended with status ([0-9]+)", log))
print(f"{'run':24}{'starts':>7}  {'statuses':12}{'records':>8}  {'weights':14}{'without Slurm':14}")
for (name, seed), (count, statuses) in starts.items():
    found, other = by_slurm[name, seed], by_hand[name, seed]
    print(f"{name + ' ' + str(seed):24}{count:7}  {' '.join(statuses):12}{len(found):8}  {found[0][:12]:14}{other[0][:12]:14}")
    assert len(found) == 1 and found == other, "not once, or other weights"
assert by_slurm.keys() == starts.keys(), "a record of a run that was cancelled"
assert starts["sparse-upcycling", 0][0] == 2 and starts["dense", 0][0] == starts["dense", 1][0] == 1
assert starts["sparse-upcycling", 5][0] == 2, "the run made no room"
assert "75" in starts["drop-upcycling", 7][1] and starts["drop-upcycling", 7][1][-1] == "0"
print("all runs once, with the same weights")
END
