#!/usr/bin/env bash
# Older and newer Python, torch and transformers: an environment for each, its tests and the demo. See --help.
# shellcheck disable=SC2317  # functions that are called by the name in a variable
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: launch/matrix.sh [OPTIONS] [NAME...]

For each combination of versions (NAME; default: all): makes a virtual environment, installs the package's
requirements, runs tests and a small demo (catalogue, shards, training, evaluation), and prints a table. A step
that passed is not run again: start the command again after an interruption. --help lists the names.

  --tests fast|unit  tests of model, data, engine, checkpoint and configuration (default), or all of tests/unit
  --cache FOLDER     environments, logs and results (default: .matrix; about 7 GB for each environment)
  --delete           delete an environment when its steps are done (its results stay)
  --fresh            forget earlier results
  --dry-run          print what would be done

Environment:
  MATRIX_PIP_OPTIONS  further options of pip, for example --extra-index-url https://download.pytorch.org/whl/cpu

A Python that is not on the PATH is looked for in ~/.pyenv and with uv, which downloads it.

names:
USAGE
    cells | while read -r name python torch transformers; do
        printf '  %-24s Python %s, torch %s, transformers %s\n' "$name" "$python" "$torch" "$transformers"
    done
}

# Name, Python, torch, transformers. "new" is the newest that pip finds.
cells() {
    cat <<'CELLS'
py311-torch-new-tf4 3.11 new >=4.57,<5
py311-torch-new-tf5 3.11 new >=5,<6
py312-torch-new-tf4 3.12 new >=4.57,<5
py312-torch211-tf5 3.12 ==2.11.* >=5,<6
py310-torch28-tf4 3.10 ==2.8.* >=4.57,<5
py310-torch28-tf5 3.10 ==2.8.* >=5,<6
CELLS
}

fail() {
    printf 'matrix.sh: error: %s (launch/matrix.sh --help)\n' "$1" >&2
    exit 2
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cache="$root/.matrix" tests=fast delete="" fresh="" dry="" wanted=()
while (($#)); do
    case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --tests | --cache)
            [[ $# -gt 1 ]] || fail "$1 needs a value"
            if [[ $1 == --tests ]]; then tests="$2"; else cache="$2"; fi
            shift
            ;;
        --delete) delete=1 ;;
        --fresh) fresh=1 ;;
        --dry-run) dry=1 ;;
        -*) fail "unknown argument '$1'" ;;
        *) wanted+=("$1") ;;
    esac
    shift
done
[[ $tests == fast || $tests == unit ]] || fail "--tests is '$tests', expected fast or unit"
for name in ${wanted[@]+"${wanted[@]}"}; do
    cells | grep -q "^$name " || fail "unknown name '$name'"
done
if [[ -z "$dry" ]]; then
    mkdir -p -- "$cache"
    cache="$(cd -- "$cache" && pwd)"
fi

test_folders() {
    if [[ $tests == unit ]]; then
        echo tests/unit
    else
        echo tests/unit/model tests/unit/data tests/unit/engine tests/unit/checkpoint tests/unit/config \
            tests/unit/distributed
    fi
}

# An interpreter of version $1, or nothing.
find_python() {
    local candidate
    for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null; then
        uv python install -q "$1" >&2 && uv python find "$1"
    fi
}

# The requirements of setup.cfg (and pytest) with the versions of this combination, one in a line.
requirements() {
    "$1" - "$root/setup.cfg" "$2" "$3" <<'PYTHON'
import configparser, re, sys
path, torch, transformers = sys.argv[1:]
listed = configparser.ConfigParser()
listed.read(path)
lines = listed["options"]["install_requires"].split("\n") + ["pytest>=8", "pytest-timeout", "pytest-xdist", "psutil", "pyarrow"]
for line in filter(None, map(str.strip, lines)):
    if re.match(r"torch\b", line) and torch != "new":
        line = f"torch{torch}"
    if line.startswith("transformers") and transformers.startswith(">=4"):
        line = f"transformers{transformers}"
    elif line.startswith("transformers"):
        continue  # streaming pins an older one: installed afterwards
    print(line)
PYTHON
}

install() {
    local folder="$1" python="$2" torch="$3" transformers="$4" options=()
    read -r -a options <<<"${MATRIX_PIP_OPTIONS:-}"
    [[ -x "$folder/venv/bin/python" ]] || "$python" -m venv "$folder/venv"
    requirements "$python" "$torch" "$transformers" >"$folder/requirements.txt"
    "$folder/venv/bin/python" -m pip install -q --no-compile ${options[@]+"${options[@]}"} -r "$folder/requirements.txt"
    case "$transformers" in
        '>=5'*) "$folder/venv/bin/python" -m pip install -q --no-compile ${options[@]+"${options[@]}"} "transformers$transformers" ;;
    esac
}

run_tests() {
    local folder="$1"
    # shellcheck disable=SC2046  # several folders
    (cd -- "$root" && PYTHONPATH="$root" "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider $(test_folders))
}

run_demo() {
    local folder="$1"
    mkdir -p "$folder/demo"
    QUICKSTART_DIR="$folder/demo" QUICKSTART_ITEMS=400 QUICKSTART_CHECK=0 QUICKSTART_SET="train.epochs=1" \
        RATING_TRAIN_SKIP_INSTALL=1 RATING_TRAIN_PYTHON="$folder/venv/bin/python" bash "$root/launch/quickstart.sh"
}

# Runs a step of a combination, unless it passed before; its output is in a log, its result in a file.
step() {
    local folder="$1" name="$2" began=$SECONDS
    shift 2
    if [[ -f "$folder/$name.result" ]] && grep -q ^passed "$folder/$name.result"; then
        return 0
    fi
    if "$@" >"$folder/$name.log" 2>&1; then
        echo "passed in $((SECONDS - began)) s" >"$folder/$name.result"
    else
        echo "failed: $folder/$name.log" >"$folder/$name.result"
        return 1
    fi
}

versions() {
    "$1/venv/bin/python" -c 'import platform, torch, transformers, deepspeed, streaming
print(platform.python_version(), torch.__version__, transformers.__version__, deepspeed.__version__, streaming.__version__)' \
        2>/dev/null | tail -1
}

summary() { # the last line of a log of pytest, without its frame
    [[ -f "$1" ]] && grep -E '(passed|failed|error).* in ' "$1" | tail -1 | sed 's/=//g; s/^ *//; s/ *$//'
}

one() {
    local name="$1" python="$2" torch="$3" transformers="$4" folder="$cache/$1" found
    found="$(find_python "$python")"
    if [[ -n "$dry" ]]; then
        printf '%s: %s, torch %s, transformers %s: install, %s, demo (in %s)\n' \
            "$name" "${found:-no Python $python}" "$torch" "$transformers" "$(test_folders)" "$folder"
        return
    fi
    mkdir -p "$folder"
    [[ -z "$fresh" ]] || rm -f -- "$folder"/*.result
    if [[ -z "$found" ]]; then
        echo "no Python $python here" >"$folder/install.result"
        return
    fi
    printf '== %s\n' "$name" >&2
    if grep -qs ^passed "$folder/tests.result" && grep -qs ^passed "$folder/demo.result"; then
        return
    fi
    if [[ ! -x "$folder/venv/bin/python" ]]; then
        rm -f -- "$folder/install.result" # deleted, or never made
    fi
    step "$folder" install install "$folder" "$found" "$torch" "$transformers" || return 0
    versions "$folder" >"$folder/versions" || true
    step "$folder" tests run_tests "$folder" || true
    step "$folder" demo run_demo "$folder" || true
    [[ -z "$delete" ]] || rm -rf -- "$folder/venv"
}

while read -r name python torch transformers <&3; do
    if ((${#wanted[@]})) && [[ " ${wanted[*]} " != *" $name "* ]]; then
        continue
    fi
    one "$name" "$python" "$torch" "$transformers" 3<&-
done 3< <(cells)
[[ -z "$dry" ]] || exit 0

bad=0
echo "| combination | Python, torch, transformers, deepspeed, streaming | install | tests | demo |"
echo "| --- | --- | --- | --- | --- |"
while read -r name _; do
    folder="$cache/$name"
    [[ -f "$folder/install.result" ]] || continue
    result() { cat "$folder/$1.result" 2>/dev/null || echo "-"; }
    echo "| $name | $(cat "$folder/versions" 2>/dev/null || echo -) | $(result install) |" \
        "$(summary "$folder/tests.log" || result tests) | $(result demo) |"
    if grep -qs ^failed "$folder"/*.result; then bad=1; fi
done < <(cells)
exit "$bad"
