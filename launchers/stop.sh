# shellcheck shell=bash
# How a run is told to end, for batch scripts and pods: it saves a checkpoint, ends with 0, and another start goes on.
# Sourced by bash from the repository's root, with RUN_DIR set:
#
#   stop_on USR1                # from now on this signal ends the run that `watch` waits for
#   watch srun python ...       # returns its exit status
#   goes_on                     # true where it was told to end and another start is to go on
#   came_further                # true where there are other checkpoints than at stop_on
#
# A stop is a word in RUN_DIR/STOP: rank 0 sees it between two steps, and all ranks save. It comes from here or from a
# rank that got a signal. An empty file (touch) is a person's: the run stays stopped.

told_to_stop=

stop_on() {
    trap 'told_to_stop=yes' "$1"
    saved_before=$(saved)
}

stopped() {
    if [ -n "$told_to_stop" ]; then echo "time is up" >"$RUN_DIR/STOP"; fi
    [ -e "$RUN_DIR/STOP" ]
}

saved() { ls "$RUN_DIR/checkpoints" 2>/dev/null; }

came_further() { [ "$(saved)" != "$saved_before" ]; }

goes_on() { [ -s "$RUN_DIR/STOP" ]; }

watch() {
    local program
    if [ -n "$told_to_stop" ]; then stopped; return; fi
    "$@" &
    program=$!
    while kill -0 "$program" 2>/dev/null; do
        stopped # again and again: a start of the trainer removes what is older than itself
        sleep 1 & wait "$!" # a trap ends a wait, not a sleep
    done
    wait "$program"
}
