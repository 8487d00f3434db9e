#!/usr/bin/env bash
# From a fresh checkout to a PLCC on a laptop: needs only Python, downloads only packages. See --help.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/quickstart.sh

Installs the package if it is missing (into the active virtual environment, else into .venv), makes a demo
catalogue whose best possible PLCC is known and a tiny model, prepares shards, trains on 2 CPU processes (or
on all GPUs of the machine), evaluates, and draws a report. At the end it compares the PLCC with the upper
bounds of the catalogue; the exit code is 0 only if the model beats what image or text alone can reach and
gets to 85 % of a perfect model.

Run it again after an interruption: finished steps are skipped, and training resumes.

Environment:
  QUICKSTART_DIR               where demo/ and runs/ are made (default: the checkout)
  QUICKSTART_ITEMS             listings in the catalogue (default: 3000)
  QUICKSTART_SET               settings for training, for example "train.epochs=1 batch.global_items=64"
  QUICKSTART_CHECK=0           exit with code 0 whatever the comparison says
  RATING_TRAIN_SKIP_INSTALL=1  install nothing
  RATING_TRAIN_PYTHON          the Python to use
USAGE
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    "") ;;
    *)
        printf "quickstart.sh: error: unknown argument '%s' (launch/quickstart.sh --help)\n" "$1" >&2
        exit 2
        ;;
esac

# shellcheck source=launch/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
# shellcheck disable=SC2119  # no extras here
rt_install
where="${QUICKSTART_DIR:-$RATING_TRAIN_ROOT}"
mkdir -p -- "$where"
cd -- "$where"
config="$RATING_TRAIN_ROOT/configs/demo_cpu.yaml" # its paths are relative to the current folder
run=runs/demo_cpu

rating_train() { "$PYTHON" -m rating_train "$@"; }

rt_say "== 1/5 demo: a catalogue and a tiny model"
if [[ -f demo/catalogue/upper_bounds.json && -d demo/model ]]; then
    rt_say "already there: demo/catalogue, demo/model"
else # made under another name and moved, so that what has its name is complete
    rm -rf -- demo/.partial demo/catalogue demo/model
    mkdir -p demo
    rating_train demo --out demo/.partial --items "${QUICKSTART_ITEMS:-3000}"
    mv -- demo/.partial/catalogue demo/.partial/model demo/
    rmdir demo/.partial
fi

rt_say "== 2/5 prepare: shards"
if [[ -f demo/data/manifest.json ]]; then
    rt_say "already there: demo/data"
else
    rating_train prepare --source demo/catalogue/catalogue.jsonl --images demo/catalogue --out demo/data \
        --image-size-px 64 --val-fraction 0.1
fi

rt_say "== 3/5 train"
settings=()
for setting in ${QUICKSTART_SET:-}; do # words, on purpose
    settings+=(--set "$setting")
done
code=0 interrupted=""
trap 'interrupted="Ctrl-C"' INT # training saves and exits with 0; what follows must not start
bash "$RATING_TRAIN_ROOT/launch/local.sh" train "$config" ${settings[@]+"${settings[@]}"} || code=$?
trap - INT
if [[ -n "$interrupted" || -f "$run/REQUEUE" ]]; then
    rt_say "stopped ($(cat -- "$run/REQUEUE" 2>/dev/null || echo "$interrupted")); run launch/quickstart.sh again to resume"
    exit 1
fi
((code == 0)) || exit "$code"

rt_say "== 4/5 evaluate: the best checkpoint"
rating_train evaluate "$run"

rt_say "== 5/5 report"
rating_train report "$run"

rt_say ""
enforce=--enforce
[[ "${QUICKSTART_CHECK:-1}" != 0 ]] || enforce=--no-enforce
"$PYTHON" "$RATING_TRAIN_ROOT/launch/quickstart_check.py" demo/catalogue/upper_bounds.json "$run" "$enforce"
rt_say "report: $PWD/$run/report"
