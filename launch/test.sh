#!/usr/bin/env bash
# Every check of the project: ruff, mypy, pytest. Further arguments go to pytest. See --help.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/test.sh [PYTEST ARGUMENTS...]

Installs the package and its test tools if they are missing (into the active virtual environment, else into
.venv), then runs ruff check, ruff format --check, mypy, pytest, and the model's tests again on
transformers 5 (installed into .transformers5). All of them run, even after a failure; the exit code is 0 only
if all passed.

  launch/test.sh                          everything
  launch/test.sh tests/unit -k schedule   the linters, and some of the tests

Environment:
  RATING_TRAIN_SKIP_INSTALL=1  install nothing
  RATING_TRAIN_PYTHON          the Python to use
  RATING_TRAIN_TEST_WORKERS    processes that share the tests of a complete run (default: the cores, at most 4)
  RATING_TRAIN_FULL=1          also run the variations that the default run skips for their time
  RATING_TRAIN_KILLS=50        kills in tests/faults/test_kill_ledger.py (default: 2) and test_prepare_kill.py (6)
USAGE
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
esac

began=$SECONDS
# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd -- "$RATING_TRAIN_ROOT"
rt_install test

failed=()
step() {
    local name="$1" start=$SECONDS
    shift
    rt_say "== $name"
    "$@" || failed+=("$name")
    rt_say "== $name: $((SECONDS - start)) s"
}

step "ruff check" "$PYTHON" -m ruff check .
step "ruff format" "$PYTHON" -m ruff format --check .
step "mypy" "$PYTHON" -m mypy
if [[ $# -eq 0 ]]; then
    # Much of the suite waits: for time limits, for processes that start, for the disk.
    workers="${RATING_TRAIN_TEST_WORKERS:-$(nproc)}"
    step "pytest" "$PYTHON" -m pytest -n "$((workers < 4 ? workers : 4))" --durations=10
else
    step "pytest" "$PYTHON" -m pytest "$@"
fi

# The model's tests again on transformers 5, which GPU images ship and which streaming's pin keeps out of the
# environment: a folder before it in the path.
transformers5="$RATING_TRAIN_ROOT/.transformers5"
if [[ $# -eq 0 ]]; then
    if [[ ! -d "$transformers5" && "${RATING_TRAIN_SKIP_INSTALL:-}" != 1 ]]; then
        # pip warns that streaming pins an older one; the environment itself is not changed.
        "$PYTHON" -m pip install -q --target "$transformers5" 'transformers>=5,<6' 'numpy<2.2' 2>/dev/null ||
            rm -rf -- "$transformers5"
    fi
    if [[ -d "$transformers5" ]]; then
        step "pytest on transformers 5" env PYTHONPATH="$transformers5:$PYTHONPATH" "$PYTHON" -m pytest \
            tests/unit/model/test_attention.py tests/unit/model/test_regressor.py tests/unit/model/test_vision.py \
            tests/unit/model/test_head.py tests/unit/data/test_prompt.py
    else
        rt_say "== transformers 5: not tested ($transformers5 is not there and could not be installed)"
    fi
fi

if ((${#failed[@]})); then
    rt_say "FAILED after $((SECONDS - began)) s: ${failed[*]}"
    exit 1
fi
rt_say "all passed in $((SECONDS - began)) s"
