# shellcheck shell=bash
# Sourced by the job scripts of slurm/, in a job. Slurm runs a copy of each script from its spool folder, so they share
# code through the checkout, where this file is.
#
# Gives  job_start NAME       read the site's settings, find Python, lay out the tasks
#        job_pick FILES...    set PICKED to the file that this task of an array is for, and WORDS to the other arguments
#        job_train CONFIG...  train, and requeue the job while it has more to do
#        job_srun WORDS...    run a command as one task per GPU, and set job_code to its exit code
#        job_check_cores      warn where a task has too few cores

# A signal may arrive at any moment, even while Python is being located: without a trap it would end the script.
# The tasks are told by srun, which forwards USR1 to all of them. (TERM would make srun kill them at once; where Slurm
# itself ends a job, it sends TERM to the tasks too, and training treats both alike.)
job_signals=0
job_pid=""
job_on_signal() {
    job_signals=$((job_signals + 1))
    rt_job_say "got SIG$1"
    [[ -z "$job_pid" ]] || kill -USR1 "$job_pid" 2>/dev/null || true
}
trap 'job_on_signal USR1' USR1
trap 'job_on_signal TERM' TERM

rt_job_say() { printf '%s %s: %s\n' "$(date +%FT%T.%3N)" "${RT_NAME:-job}" "$*"; }

job_start() {
    RT_NAME="$1"
    local root setup_failed=""
    root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
    local site="${CLUSTER_ENV:-$root/slurm/cluster.env}"
    if [[ -f "$site" ]]; then
        # shellcheck source=/dev/null
        source "$site"
    fi
    if [[ -n "${CLUSTER_SETUP:-}" ]]; then
        set +eu # the functions of `module` are not written for these
        eval "$CLUSTER_SETUP" || setup_failed=$?
        set -eu
    fi
    # shellcheck source=launch/env.sh
    source "$root/launch/env.sh"
    [[ -z "$setup_failed" ]] || rt_die "CLUSTER_SETUP failed with exit code $setup_failed: $CLUSTER_SETUP"
    MAX_REQUEUES="${MAX_REQUEUES:-20}"
    [[ "$MAX_REQUEUES" =~ ^[0-9]+$ ]] || rt_die "MAX_REQUEUES is '$MAX_REQUEUES', expected a number, 0 or more"
    job_restarts="${SLURM_RESTART_COUNT:-0}" # not set in the first attempt
    # For a task of an array, not SLURM_JOB_ID: that of the last task is also the id of the array, and requeueing it
    # would requeue all tasks.
    job_id="$SLURM_JOB_ID"
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job_id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    job_place
    rt_job_say "job $job_id, attempt $((job_restarts + 1)): $SLURM_JOB_NUM_NODES nodes" \
        "($SLURM_JOB_NODELIST) x $job_tasks tasks, head $MASTER_ADDR:$MASTER_PORT, ends ${job_end:-at no known time}"
}

# Set the number of tasks per node, the rendezvous, and the end of the job.
job_place() {
    local uniform='^([0-9]+)(\(x[0-9]+\))?$' end
    job_tasks=1
    if [[ "${SLURM_TASKS_PER_NODE:-}" =~ $uniform ]]; then
        job_tasks="${BASH_REMATCH[1]}"
    elif [[ -n "${SLURM_TASKS_PER_NODE:-}" ]]; then
        rt_die "the nodes have different numbers of tasks ($SLURM_TASKS_PER_NODE): set --ntasks-per-node"
    fi
    if ((${SLURM_GPUS_ON_NODE:-0} > job_tasks)); then
        rt_die "a node has $SLURM_GPUS_ON_NODE GPUs and $job_tasks tasks, which would leave GPUs idle:" \
            "run sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE ..., or submit with rating-train submit"
    fi
    MASTER_ADDR="$(job_head)"
    # A different port for each attempt, below the range of outgoing connections; this script runs on the head.
    MASTER_PORT="$(job_free_port $((10000 + (SLURM_JOB_ID + 7919 * job_restarts) % 20000)))"
    export MASTER_ADDR MASTER_PORT
    # Training stops by itself before it. Older versions of Slurm do not set it.
    job_end="$(squeue --noheader --jobs="$job_id" --format=%e 2>/dev/null | head -n 1)" || job_end=""
    if end="$(date -d "${job_end:-none}" +%s 2>/dev/null)"; then
        export SLURM_JOB_END_TIME="$end"
    fi
    # Each task has its own cores; without a limit, each process uses all of the node's.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
}

# Print the first node's name, or its address where the name does not resolve.
job_head() {
    local first
    read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if getent hosts "$first" >/dev/null; then
        printf '%s\n' "$first"
    else
        scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
    fi
}

# Print the first port from $1 on at which no process of this node listens.
job_free_port() {
    local port="$1" last=$(($1 + 100))
    while ((port < last)) && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        port=$((port + 1))
    done
    printf '%s\n' "$port"
}

job_pick() {
    local -a files=()
    while (($#)) && [[ "$1" != -* ]]; do
        files+=("$1")
        shift
    done
    ((${#files[@]})) || rt_die "the first argument is missing"
    # shellcheck disable=SC2034  # for the script that sources this one
    WORDS=("$@")
    local index="${SLURM_ARRAY_TASK_ID:-0}"
    if ((${#files[@]} > 1)) && [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
        rt_die "${#files[@]} arguments need an array: sbatch --array=0-$((${#files[@]} - 1)) ..."
    fi
    ((index < ${#files[@]})) || rt_die "array task $index has no argument: there are ${#files[@]}"
    PICKED="${files[index]}"
    [[ -e "$PICKED" ]] || rt_die "not found: $PICKED (seen from $PWD on $(hostname))"
}

job_srun() {
    local seen
    local -a options=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * job_tasks))"
        --ntasks-per-node="$job_tasks" --distribution=block)
    # Since Slurm 22.05, srun does not inherit it from sbatch.
    [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    # After a failure the other tasks get a minute to fail on their own: killed at once, they would hide its exit code.
    srun "${options[@]}" --kill-on-bad-exit=0 --wait=60 "$@" &
    job_pid=$!
    ((job_signals == 0)) || kill -USR1 "$job_pid" 2>/dev/null || true
    while true; do # a trapped signal interrupts `wait`, which then does not return srun's exit code
        seen=$job_signals
        job_code=0
        wait "$job_pid" || job_code=$?
        ((seen != job_signals)) || break
    done
    job_pid=""
}

# Warn where the tasks have fewer cores than processes.
job_check_cores() {
    rt_check_cores "${SLURM_CPUS_PER_TASK:-1}" "sbatch --cpus-per-task=$((RT_WORKERS + 1)), or" \
        "CLUSTER_CPUS_PER_TASK=$((RT_WORKERS + 1)) in slurm/cluster.env"
}

# job_preflight RUN CONFIG [WORDS...]: check the nodes for the configuration that is trained, with the --set among the
# words: train.device, data.workers and the batch decide what is needed.
job_preflight() {
    [[ "${PREFLIGHT:-0}" != 0 ]] || return 0
    local run="$1" config="$2"
    local -a settings=()
    shift 2
    while (($#)); do
        case "$1" in
            --set=*) settings+=("$1") ;;
            --set) settings+=("--set=${2:-}") ;;
        esac
        shift
    done
    job_srun "$PYTHON" -m rating_train preflight "$run" --config "$config" "${settings[@]}"
    ((job_code == 0)) || rt_die "preflight failed (exit code $job_code): training was not started"
    [[ "$PREFLIGHT" != only ]] || exit 0
}

job_train() {
    local run before
    rt_read_config "$@"
    run="$RT_RUN"
    job_check_cores
    rt_traces "$run"
    job_preflight "$run" "$@"
    before="$(job_newest "$run")"
    job_srun "$PYTHON" -m rating_train train "$@"
    rt_job_say "training ended with exit code $job_code"
    job_next "$run" "$before"
}

# Print what identifies the newest checkpoint of a run: the content of its pointer.
job_newest() { cat -- "$1/checkpoints/latest.json" 2>/dev/null || true; }

# Decide whether to requeue the job, say why or why not, and exit.
job_next() {
    local run="$1" before="$2" why state
    # Slurm is ending the job because somebody cancelled or requeued it: they decide what follows.
    state="$(squeue --noheader --jobs="$job_id" --format=%T 2>/dev/null | head -n 1)" || state=unknown
    if [[ "$state" != RUNNING && "$state" != unknown ]]; then
        rt_job_say "not requeued by itself: Slurm is ending this job ($state)"
        exit "$job_code"
    fi
    if ((job_code == 0)); then
        if [[ ! -f "$run/REQUEUE" ]]; then
            rt_job_say "done: nothing left to requeue for"
            exit 0
        fi
        why="$(<"$run/REQUEUE")"
    elif ((job_code == 2)); then
        rt_job_say "not requeued: exit code 2 is a user error in the settings or the data, named above"
        exit 2
    elif ((job_signals > 0)); then
        why="asked to stop before it could save (exit code $job_code)"
    elif [[ "$(job_newest "$run")" != "$before" ]]; then
        why="crashed with exit code $job_code, after it had saved a checkpoint"
    elif ((job_restarts == 0)); then
        why="crashed with exit code $job_code in its first attempt"
    else
        rt_job_say "not requeued: crashed with exit code $job_code, and saved no checkpoint in this attempt"
        exit "$job_code"
    fi
    if ((job_restarts >= MAX_REQUEUES)); then
        rt_job_say "not requeued: MAX_REQUEUES=$MAX_REQUEUES reached ($why); submit it again to resume"
        exit 1 # not 0: a job that waits for the success of this one must not start
    fi
    rt_job_say "requeued $((job_restarts + 1)) of at most $MAX_REQUEUES: $why"
    job_requeue
}

job_requeue() {
    local try
    for try in 1 2 3 4 5 6; do # the controller may be restarting
        if scontrol requeue "$job_id"; then
            exit 0
        fi
        sleep $((try * 5))
    done
    rt_job_say "could not be requeued: see the lines above (is JobRequeue off?); submit it again to resume"
    exit 1
}
