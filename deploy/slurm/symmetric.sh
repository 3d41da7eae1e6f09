#!/bin/bash
# A search with one driver and one Ray on all nodes of the job, by `ray symmetric-run`. All nodes must be free at the same time, and if
# the first one fails, the search stops until the job is requeued: array.sh needs neither.
#   sbatch --nodes=4 deploy/slurm/symmetric.sh grid
#
# The folder and HPO_STORAGE_FILE are those of array.sh. The nodes must be exclusive: at the end, Ray stops all of your Ray
# processes on them.
#SBATCH --job-name=hpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hpo-%j.txt
set -eu
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
[ -n "${HPO_STORAGE:-}" ] || export HPO_STORAGE_FILE="${HPO_STORAGE_FILE:-$HOME/.hpo-storage}"
export TMPDIR=/tmp # the paths of Ray's sockets have at most 107 characters
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# Ray listens on the network of the nodes. Who does not have this token cannot use it.
secret=$(mktemp -d "$PWD/.ray-token-XXXXXX")
trap 'rm -rf "$secret"' EXIT
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$secret/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secret/token"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
deploy/slurm/until-limit.sh \
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_PER_TASK" -- \
    env RAY_ADDRESS="$head:6379" hpo run "$@"
