# shellcheck shell=bash
# Sourced by every script of launch/.
#
# Sets   PYTHON             the interpreter to use, in this order: RATING_TRAIN_PYTHON, the active virtual
#                           environment, .venv of this checkout, python3 (then python3.12, 3.11, 3.10)
#        RATING_TRAIN_ROOT  this checkout; it is put first in PYTHONPATH, so its code is what runs
# Gives  rt_install, rt_cores, rt_threads, rt_gpus, rt_read_config, rt_check_cores, rt_traces, rt_start, rt_say, rt_die
#
# Every variable that is set already is left as it is.

RATING_TRAIN_ROOT="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
export RATING_TRAIN_ROOT
export PYTHONPATH="$RATING_TRAIN_ROOT${PYTHONPATH:+:$PYTHONPATH}"

# The last lines of a killed process reach the log, and a crash in C code shows where it happened.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
# A rank whose NCCL collective failed or timed out ends, and the launcher ends the others, instead of all
# hanging. 3 is torch's own default (end the process without aborting the communicator); pinned here.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# NCCL names the cause of an error; by default it prints nothing.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The flight recorder: each rank keeps its last collectives in memory and dumps them when one times out. The files
# say which rank was late, and in which collective. 2000 is torch's own default, pinned here. (The names are
# those that torch's NCCL group reads; before torch 2.9 the first was TORCH_NCCL_TRACE_BUFFER_SIZE.)
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# How long the ranks may take to write these files before the process ends: a shared disk can be slow.
export TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC="${TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC:-30000}"
# A second guard, for an NCCL watchdog that hangs itself (in a CUDA call that never returns): the process ends after so
# many seconds without a heartbeat from it. As long as a collective may take (10 minutes, see world.connect): a shorter
# limit could end a process whose collective is still waiting legitimately.
# From torch 2.15 on, "nccl" is another implementation, whose headers know nothing of this guard (the settings above are
# kept there): what ends such a process then is the run's own watchdog. TORCH_DIST_USE_NCCL2=0 selects the former one.
export TORCH_NCCL_ENABLE_MONITORING="${TORCH_NCCL_ENABLE_MONITORING:-1}"
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-600}"
# A rendezvous store of its own for every restart by torchrun: in one that is shared with the agent, the default, the
# restarted processes find the addresses of dead ones and connect to those.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

rt_say() { printf '%s\n' "$*"; }

# A user error: one line on stderr, exit code 2. RT_NAME: the script's name where $0 is another.
rt_die() {
    printf '%s: error: %s\n' "${RT_NAME:-$(basename -- "$0")}" "$*" >&2
    exit 2
}

rt_python_fits() {
    "$1" -c 'import sys; raise SystemExit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

rt_pick_python() {
    local candidate
    if [[ -n "${RATING_TRAIN_PYTHON:-}" ]]; then
        candidate="$RATING_TRAIN_PYTHON"
    elif [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
        candidate="$VIRTUAL_ENV/bin/python"
    elif [[ -x "$RATING_TRAIN_ROOT/.venv/bin/python" ]]; then
        candidate="$RATING_TRAIN_ROOT/.venv/bin/python"
    else
        for candidate in python3 python3.12 python3.11 python3.10; do
            rt_python_fits "$candidate" && break
        done
    fi
    rt_python_fits "$candidate" || rt_die \
        "no Python 3.10, 3.11 or 3.12: $candidate is $("$candidate" --version 2>&1 || true)." \
        "Install one, or name it with RATING_TRAIN_PYTHON=/path/to/python"
    PYTHON="$candidate"
}

# Whether PYTHON is in a virtual environment.
rt_in_venv() {
    "$PYTHON" -c 'import sys; raise SystemExit(sys.prefix == sys.base_prefix)'
}

# Print those of the modules "$@" that PYTHON cannot find. Nothing is imported: this takes milliseconds.
rt_missing() {
    "$PYTHON" -c '
import importlib.util, sys
print(" ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "$@"
}

# rt_install [test]: make sure that PYTHON has what the package (and its tests) need. Where PYTHON is not in
# a virtual environment, make .venv in the checkout and use it. RATING_TRAIN_SKIP_INSTALL=1 only looks.
rt_install() {
    local extra="${1:-}" missing
    local modules=(torch deepspeed transformers streaming numpy scipy PIL yaml tensorboard matplotlib tqdm)
    [[ "$extra" != test ]] || modules+=(pytest pytest_timeout ruff mypy sklearn)
    missing="$(rt_missing "${modules[@]}")"
    [[ -n "$missing" ]] || return 0
    if [[ "${RATING_TRAIN_SKIP_INSTALL:-0}" == 1 ]]; then
        rt_die "$PYTHON lacks $missing, and RATING_TRAIN_SKIP_INSTALL=1 forbids installing it"
    fi
    if ! rt_in_venv; then
        rt_say "making $RATING_TRAIN_ROOT/.venv with $("$PYTHON" --version)"
        if ! "$PYTHON" -m venv "$RATING_TRAIN_ROOT/.venv"; then
            rm -rf -- "$RATING_TRAIN_ROOT/.venv"
            rt_die "$PYTHON cannot make virtual environments (on Debian: apt-get install python3-venv)"
        fi
        PYTHON="$RATING_TRAIN_ROOT/.venv/bin/python"
        export RATING_TRAIN_PYTHON="$PYTHON" # for the scripts that this one starts
    fi
    rt_say "installing into $("$PYTHON" -c 'import sys; print(sys.prefix)') (a few minutes, about 6 GB)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --editable "$RATING_TRAIN_ROOT${extra:+[$extra]}"
}

# Print the number of GPUs that this process may use.
rt_gpus() {
    "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
}

# Print the number of cores that this process may use (nproc alone would print OMP_NUM_THREADS where that is set).
rt_cores() {
    env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1
}

# rt_threads PROCESSES: cores / processes threads for each of them. Without this, torchrun gives each one
# thread, and a process without a launcher takes all cores.
rt_threads() {
    local each=$(($(rt_cores) / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((each > 0 ? each : 1))}"
}

# rt_read_config CONFIG|RUN [WORDS...]: check the configuration, with the --set among the words, and set RT_RUN (the run
# directory) and RT_WORKERS (data.workers). A user error is reported here once, in one line, with exit code 2: N processes
# would all report it, and a launcher would bury it under its own messages and change the exit code.
rt_read_config() {
    local config="$1" run="" found
    shift
    if [[ -d "$config" ]]; then # it may have been moved: where it is now counts, not its runs_dir
        run="$config"
        config="$run/config.yaml"
    fi
    found="$("$PYTHON" -c '
import os, sys
from rating_train.config.load import load_config
from rating_train.errors import UserError
name, run, path, *words = sys.argv[1:]
overrides = [w[6:] for w in words if w.startswith("--set=")]
overrides += [after for word, after in zip(words, words[1:]) if word == "--set"]
try:
    config = load_config(path, overrides)
except UserError as e:
    raise SystemExit(print(f"{name}: error: {e}", file=sys.stderr) or 2)
print(config.data.workers, run or os.path.join(config.runs_dir, config.name))
' "${RT_NAME:-$(basename -- "$0")}" "$run" "$config" "$@")" || exit $?
    # shellcheck disable=SC2034  # RT_RUN is for the script that sources this one
    read -r RT_WORKERS RT_RUN <<<"$found"
}

# rt_check_cores CORES FIX...: warn where a rank has fewer cores than processes (itself and its DataLoader workers).
rt_check_cores() {
    local cores="$1" needed=$((RT_WORKERS + 1))
    shift
    ((cores < needed)) || return 0
    printf '%s: warning: each rank has %s of the %s cores that it and its %s DataLoader workers need: %s\n' \
        "${RT_NAME:-$(basename -- "$0")}" "$cores" "$needed" "$RT_WORKERS" "training will wait for data" >&2
    printf '%s: warning: fix: %s, or --set data.workers=%s\n' \
        "${RT_NAME:-$(basename -- "$0")}" "$*" "$((cores > 1 ? cores - 1 : 0))" >&2
}

# rt_traces RUN: make the flight recorder write to RUN/logs/nccl_trace_rank_N, on all nodes.
rt_traces() {
    mkdir -p -- "$1/logs"
    export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$(cd -- "$1/logs" && pwd)/nccl_trace_rank_}"
}

# rt_start PROCESSES DEFAULT VERB KIND [SUBJECT WORDS...]: all that comes before torchrun on a machine: see that SUBJECT, a
# KIND of file, is there, read the configuration, choose the number of processes (PROCESSES; where that is empty one per
# GPU, and DEFAULT without GPUs) and their threads. Sets RT_PROCESSES beside what rt_read_config sets.
rt_start() {
    RT_PROCESSES="$1"
    local default="$2" verb="$3" kind="$4" subject="${5:-}"
    [[ -n "$subject" && "$subject" != -* ]] || rt_die "the first argument of $verb is its $kind"
    [[ -e "$subject" ]] || rt_die "$kind not found: $subject (seen from $PWD on $(hostname))"
    shift 4
    rt_read_config "$@"
    [[ -n "$RT_PROCESSES" ]] || RT_PROCESSES="$(rt_gpus)"
    ((RT_PROCESSES > 0)) || RT_PROCESSES="$default"
    rt_threads "$RT_PROCESSES"
    rt_check_cores "$(($(rt_cores) / RT_PROCESSES))" "start fewer processes (-n)"
}

rt_pick_python
