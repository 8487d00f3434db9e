# shellcheck shell=bash
# Sourced by every script of launch/.
#
# Sets   PYTHON             the interpreter to use, in this order: RATING_TRAIN_PYTHON, the active virtual
#                           environment, .venv of this checkout, python3 (then python3.12, 3.11, 3.10)
#        RATING_TRAIN_ROOT  this checkout; it is put first in PYTHONPATH, so its code is what runs
# Gives  rt_install, rt_threads, rt_gpus, rt_say, rt_die
#
# Every variable that is set already is left as it is.

RATING_TRAIN_ROOT="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
export RATING_TRAIN_ROOT
export PYTHONPATH="$RATING_TRAIN_ROOT${PYTHONPATH:+:$PYTHONPATH}"

# Lines of a killed process reach the log, and a crash in C code shows where it was.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
# A rank whose NCCL collective failed or timed out ends, and the launcher ends the others, instead of all
# hanging. 3 is torch's own default (end the process, leave the communicator alone); pinned here.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# NCCL names the cause of an error; at its default it says nothing.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

rt_say() { printf '%s\n' "$*"; }

# One line on stderr, exit code 2: something that the user can mend.
rt_die() {
    printf '%s: error: %s\n' "$(basename -- "$0")" "$*" >&2
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

# Whether PYTHON lives in a virtual environment.
rt_in_venv() {
    "$PYTHON" -c 'import sys; raise SystemExit(sys.prefix == sys.base_prefix)'
}

# Those of the modules "$@" that PYTHON cannot find. Nothing is imported: this takes milliseconds.
rt_missing() {
    "$PYTHON" -c '
import importlib.util, sys
print(" ".join(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))' "$@"
}

# rt_install [test]: make sure that PYTHON has what the package (and its tests) need. Where PYTHON is not in
# a virtual environment, makes .venv in the checkout and goes on with it. RATING_TRAIN_SKIP_INSTALL=1 only looks.
rt_install() {
    local extra="${1:-}" missing
    local modules=(torch deepspeed transformers streaming numpy scipy PIL yaml tensorboard matplotlib tqdm)
    [[ "$extra" != test ]] || modules+=(pytest pytest_timeout ruff mypy)
    missing="$(rt_missing "${modules[@]}")"
    [[ -n "$missing" ]] || return 0
    if [[ "${RATING_TRAIN_SKIP_INSTALL:-0}" == 1 ]]; then
        rt_die "$PYTHON lacks $missing, and RATING_TRAIN_SKIP_INSTALL=1 forbids to install"
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
    rt_say "installing into $("$PYTHON" -c 'import sys; print(sys.prefix)') (some minutes, about 6 GB)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --editable "$RATING_TRAIN_ROOT${extra:+[$extra]}"
}

# GPUs that this process may use.
rt_gpus() {
    "$PYTHON" -c 'import torch; print(torch.cuda.device_count())'
}

# rt_threads PROCESSES: cores / processes threads for each of them. Without this, torchrun gives each one
# thread, and a process without a launcher takes all cores.
rt_threads() {
    local cores
    cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
    local each=$((cores / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((each > 0 ? each : 1))}"
}

rt_pick_python
