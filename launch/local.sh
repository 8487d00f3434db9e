#!/usr/bin/env bash
# Run a verb on all GPUs of this machine, or on 2 CPU processes: torchrun, one node. See --help.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/local.sh [-n N] train CONFIG [--set A.B=V]... [--resume auto|never|must|PATH]
       launch/local.sh [-n N] evaluate RUN [--checkpoint best|latest|STEP] [--split SPLIT] [--set A.B=V]...
       launch/local.sh [-n N] predict RUN --source FILE... --images DIR --out FILE
       launch/local.sh [-n N] features|bench CONFIG [--set A.B=V]...

Runs `rating-train VERB ...` in N processes on this machine, with torchrun.

  -n N         number of processes (default: the number of GPUs, or 2 without one)
  -h, --help   this text; `rating-train VERB --help` has the options of the verb

Environment:
  RATING_TRAIN_PYTHON  the Python to use (default: active virtual environment, .venv, python3)
  OMP_NUM_THREADS      threads of each process (default: cores / N)

Stop it with Ctrl-C or `touch RUN/STOP`: it saves a checkpoint first, and the same command resumes from it.
USAGE
}

die_early() {
    printf 'local.sh: error: %s\n' "$*" >&2
    exit 2
}

ranks=""
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        -n)
            (($# > 1)) || die_early "-n needs a number of processes"
            ranks="$2"
            [[ "$ranks" =~ ^[1-9][0-9]*$ ]] || die_early "-n is '$ranks', expected a number of processes, 1 or more"
            shift 2
            ;;
        -*) die_early "unknown option $1 (launch/local.sh --help)" ;;
        *) break ;;
    esac
done

verb="${1:-}"
case "$verb" in
    train | features | bench) what="configuration file" ;;
    evaluate | predict) what="run directory" ;;
    "") die_early "no verb given: train, evaluate or predict (launch/local.sh --help)" ;;
    *.yaml | *.yml) die_early "no verb given; for this file: launch/local.sh train $verb" ;;
    *) die_early "'$verb' runs in one process; use: rating-train $*" ;;
esac
shift

# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

rt_start "$ranks" 2 "$verb" "$what" "$@"
case "$verb" in features | bench) ;; *) rt_traces "$RT_RUN" ;; esac # those have no run directory
exec "$PYTHON" -m rating_train.distributed.launcher "$RT_RUN" --standalone --nproc-per-node "$RT_PROCESSES" \
    -m rating_train "$verb" "$@"
