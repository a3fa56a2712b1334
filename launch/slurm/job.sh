#!/usr/bin/env bash
# job.sh CONFIG [FLAGS OF train_vit.py]: what a job does once, on its first node. The *.sbatch files end in it.
#
# Before the time limit Slurm sends USR1 to this shell alone (--signal=B:USR1@...). It goes on to the processes that
# train; they save a checkpoint and end, and the job puts itself back into the queue. It keeps its number, hence its
# folder, and goes on from the newest checkpoint.
set -euo pipefail
config=$1
shift

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from sbatch
fi
echo "$(date +%T) start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID: $config on $SLURM_JOB_NODELIST," \
    "$MASTER_ADDR:$MASTER_PORT"

srun --kill-on-bad-exit=1 bash launch/node.sh "$config" \
    --output_dir "runs/${SLURM_JOB_NAME:-vit}-$SLURM_JOB_ID" --resume_from_checkpoint latest "$@" &
step=$!

asked=no
# srun hands the signal to every process of every task.
trap 'asked=yes; echo "$(date +%T) USR1: the run is asked for a checkpoint"; kill -USR1 "$step"' USR1
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # over, or cut short by the trap
done
status=0
wait "$step" || status=$?

# A launcher says 1 for whatever its processes end with. Asked to stop and not done: the rest is for the next start.
if [[ $asked == yes && $status -ne 0 ]]; then
    echo "$(date +%T) back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
