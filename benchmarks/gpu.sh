#!/usr/bin/env bash
# The table of docs/performance.md on one GPU, in a few minutes, without network, weights or data.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
    cat <<'EOF'
usage: benchmarks/gpu.sh [--cpu] [OUT] [SETTING=VALUE...]

Measures full fine-tuning of the 228M model with random weights on synthetic listings: micro-batch sizes, eager and
compiled layers, ZeRO stages 0 and 1, micro-batches cut and padded, loader and complete training; each against limits of the
same run (rating-train bench). Writes OUT/NAME.json for each and prints one table. OUT is bench-gpu by default.

--cpu    the smallest form of it, with the demo's model, to see that it works
EOF
    exit 0
fi

root="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
config="$root/configs/full_ft_228m.yaml" rounds=3 steps=6 cpu=""
if [[ "${1:-}" == --cpu ]]; then
    cpu=1 config="$root/configs/demo_cpu.yaml" rounds=1 steps=2
    shift
fi
out="${1:-bench-gpu}"
[[ $# -eq 0 ]] || shift
mkdir -p -- "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
common=(data.path=synthetic model.freeze=[])
settings=("$@")

# measure NAME PARTS SETTING...: one run of the bench; a size that does not fit in memory is a line, not the end.
measure() {
    local name="$1" parts="$2" part words=()
    shift 2
    for part in $parts; do words+=(--part "$part"); done
    for part in "${common[@]}" "$@" ${settings[@]+"${settings[@]}"}; do words+=(--set "$part"); done
    rt_say "== $name"
    "$PYTHON" -m rating_train bench "$config" --rounds "$rounds" --steps "$steps" --json "$out/$name.json" \
        "${words[@]}" 2>"$out/$name.log" || rt_say "   failed: $(tail -n 1 "$out/$name.log")"
}

if [[ -n "$cpu" ]]; then
    measure cpu "loader forward step train" model.backbone=synthetic zero.stage=0 train.device=cpu \
        batch.global_items=4 batch.micro_items=2
else
    for items in 16 64 128 256; do
        measure "eager_stage1_$items" "forward step" zero.stage=1 batch.global_items="$items"
    done
    measure eager_stage0_64 "step" zero.stage=0 batch.global_items=64
    measure padded_stage1_64 "forward step" zero.stage=1 batch.global_items=64 batch.length_multiple_tokens=0
    measure accumulated_stage1_64 "step" zero.stage=1 batch.global_items=64 batch.micro_items=16
    # Coarser lengths: each is a graph to compile.
    measure compiled_stage1_64 "forward step" zero.stage=1 batch.global_items=64 train.compile=blocks \
        batch.length_multiple_tokens=64
    measure compiled_stage0_64 "step" zero.stage=0 batch.global_items=64 train.compile=blocks \
        batch.length_multiple_tokens=64
    measure train_stage1_64 "loader train" zero.stage=1 batch.global_items=64
fi
results=("$out"/*.json)
[[ -e "${results[0]}" ]] || rt_die "nothing could be measured; why is in $out/*.log"
"$PYTHON" "$root/benchmarks/bench_table.py" "${results[@]}"
