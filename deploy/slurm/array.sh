#!/bin/bash
# A search as an array job: each task is a driver with a Ray of its own, on one node. They meet in PostgreSQL only, so a task may start
# late, be preempted, or end early, and no port is open between nodes.
#   sbatch --array=0-15 deploy/slurm/array.sh grid
#
# Submit it in the folder with search_spaces/ and .venv/, on a disk that all nodes see: a trial that moves to another node resumes
# from its checkpoint in runs/. A file of yours holds the URL of the database, and HPO_STORAGE_FILE names it:
#   install -m 600 /dev/stdin ~/.hpo-storage <<< 'postgresql://hpo_runner:PASSWORD@db.example/hpo'
#SBATCH --job-name=hpo
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=hpo-%A_%a.txt
set -eu
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
[ -n "${HPO_STORAGE:-}" ] || export HPO_STORAGE_FILE="${HPO_STORAGE_FILE:-$HOME/.hpo-storage}"
export TMPDIR=/tmp # the paths of Ray's sockets have at most 107 characters
# srun does not inherit --cpus-per-task.
exec deploy/slurm/until-limit.sh srun --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" hpo run "$@"
