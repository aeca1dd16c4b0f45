# shellcheck shell=bash
# What the batch scripts share: elements of arrays, the look before a start, and what follows a job's last step. Sourced
# from the repository's root.

if [ -n "${SLURM_HET_SIZE:-}" ]; then
    echo "error: a heterogeneous job has a list of nodes for each component, and a run needs one: submit it without ':'" >&2
    exit 2
fi

# A run directory with this element's number in place of %a. All elements of an array would train in one without it.
of_this_element() {
    if [[ -n "${SLURM_ARRAY_TASK_ID:-}" && "$1" != *%a* ]]; then
        echo "error: RUN_DIR $1: an array needs one for each element; write %a where its number is to stand" >&2
        return 2
    fi
    echo "${1//%a/${SLURM_ARRAY_TASK_ID:-}}"
}

# Whether tools/doctor.py looks at machine, recipe and disks before the trainer: at a job's first start, as later ones
# find the recipe, data and JSON that it has seen, and the trainer compares what may differ between nodes.
wants_doctor() { [[ "${DOCTOR:-1}" != 0 && "${SLURM_RESTART_COUNT:-0}" = 0 ]]; }

# Whether Slurm has told this job to make room. TERM has then gone to the tasks and not to this shell.
preempted() { scontrol show job -o "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; }

requeue() {
    echo "requeueing ($1); the work goes on where it stopped"
    exec scontrol requeue "$SLURM_JOB_ID"
}

# The end of a run's job, by the exit status of its last step. Of a node that is lost srun waits until Slurm knows, which
# then requeues the job itself.
end_job() {
    if [ "$1" = 0 ] && goes_on; then requeue "told to stop"; fi
    if [ "$1" != 0 ] && preempted; then requeue "preempted"; fi
    if [ "$1" = 142 ] && came_further; then requeue "it hung"; fi # the watchdog's; not where it hangs at once, again
    exit "$1"
}
