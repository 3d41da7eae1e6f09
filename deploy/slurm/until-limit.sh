#!/bin/bash
# Runs a command that ends with the arguments of `hpo run`, and lets it stop in good order before the job's time limit. If the search
# is not done then, the job goes back into the queue. The scripts next to this one use it:
#   until-limit.sh srun hpo run grid
set -u
reserve=${HPO_RESERVE_SECONDS:-600} # for the epochs in flight, the checkpoints and the report: more than the longest epoch
restarts=${HPO_MAX_RESTARTS:-100}   # of one job

for number in "$reserve" "$restarts"; do
    [[ $number =~ ^(0|[1-9][0-9]*)$ ]] && continue
    echo "until-limit.sh: HPO_RESERVE_SECONDS and HPO_MAX_RESTARTS are whole numbers, such as 600, not $number" >&2
    exit 2
done
: "${SLURM_JOB_END_TIME:?is set by Slurm 22.05 or newer, in a job}"
seconds=$((SLURM_JOB_END_TIME - $(date +%s) - reserve))
if [ "$seconds" -le 0 ]; then
    echo "until-limit.sh: the job ends in less than $reserve s: raise --time, or lower HPO_RESERVE_SECONDS" >&2
    exit 2
fi
SECONDS=0
"$@" --exit-after "${seconds}s"
code=$?
# Not after scancel, when nobody wants the job back, nor after a preemption, when Slurm itself requeues it.
if [ "$code" -eq 130 ] && [ "$SECONDS" -ge "$seconds" ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$restarts" ]; then
        echo "until-limit.sh: not requeued after $restarts restarts: raise HPO_MAX_RESTARTS" >&2
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
