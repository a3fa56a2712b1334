#!/usr/bin/env bash
# node.sh CONFIG [FLAGS]: one node's part of a job on several. To be started once on each node, there: by srun, as
# slurm/train.sbatch does it, or as a pod's command. Slurm, or Kubeflow's PET_* variables, say which node it is.
# CONFIG is a file of configs/ without .yaml. SCRIPT=my.py in the environment runs another script than train_vit.py.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
config=${1:?which file of $here/configs, such as fsdp2}
shift
[[ -f $here/configs/$config.yaml ]] || { echo "node.sh: there is no $here/configs/$config.yaml" >&2; exit 2; }

nodes=${PET_NNODES:-${SLURM_NNODES:?neither Slurm nor Kubeflow says how many nodes there are}}
rank=${PET_NODE_RANK:-${SLURM_NODEID:?}} # known on the node only: in a batch script it is 0
processes=${PROCS_PER_NODE:-${PET_NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
[[ $processes =~ ^(auto|gpu)$ ]] && processes=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true) # as Kubeflow may say
[[ $processes =~ ^[1-9][0-9]*$ ]] || { echo "node.sh: $processes processes on a node? Set PROCS_PER_NODE" >&2; exit 2; }

options=()
case $config in
hsdp) # parameters are sharded within a node, gradients averaged between nodes
    options+=(--parallelism_config_dp_replicate_size "$nodes" --parallelism_config_dp_shard_size "$processes") ;;
zero*) # torchrun's rendezvous, as for the others; Accelerate's own choice is pdsh from the first node
    options+=(--deepspeed_multinode_launcher standard) ;;
esac

# A launcher that gets SIGTERM, as an evicted pod's does, hands it on, and kills what still runs after this many seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}

# srun hands USR1 to all processes here. It would end the launcher, which does not know it. Ignored from here on, it
# concerns only the processes that train, once they have set a handler of their own.
trap '' USR1
exec accelerate launch --config_file "$here/configs/$config.yaml" \
    --num_machines "$nodes" --num_processes $((nodes * processes)) --machine_rank "$rank" \
    --main_process_ip "${PET_MASTER_ADDR:-$MASTER_ADDR}" --main_process_port "${PET_MASTER_PORT:-$MASTER_PORT}" \
    "${options[@]}" "${SCRIPT:-$here/train_vit.py}" "$@"
