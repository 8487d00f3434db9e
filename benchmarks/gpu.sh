#!/usr/bin/env bash
# The table of docs/performance.md on one GPU, in a few minutes, without network, weights or data.
set -euo pipefail

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    cat <<'EOF'
usage: benchmarks/gpu.sh [--cpu] [OUT] [SETTING=VALUE...]

Measures full fine-tuning of the 228M model with random weights on synthetic listings: micro-batch sizes, eager and
compiled layers, ZeRO stages 0 and 1, micro-batches cut and padded, loader and complete training; each against limits of the
same run (rating-train bench). Then a profile of the steps, and the same model, shards and batch under a plain loop and,
where accelerate is installed, the Hugging Face Trainer. Writes OUT/NAME.json for each, OUT/trace.json for
ui.perfetto.dev, and prints one table. OUT is bench-gpu by default.

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
[[ "${1:-}" != -* ]] || rt_die "unknown option '$1' (benchmarks/gpu.sh --help)"
[[ "${1:-}" != *=* ]] || rt_die "'$1' is a setting; the folder of the results comes before it (benchmarks/gpu.sh --help)"
out="${1:-bench-gpu}"
[[ $# -eq 0 ]] || shift
mkdir -p -- "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
common=(data.path=synthetic model.freeze=[])
settings=("$@") results=()

# measure NAME PARTS SETTING...: one run of the bench; a size that does not fit in memory is a line, not the end.
measure() {
    local name="$1" parts="$2" part words=()
    shift 2
    for part in $parts; do words+=(--part "$part"); done
    for part in "${common[@]}" "$@" ${settings[@]+"${settings[@]}"}; do words+=(--set "$part"); done
    rt_say "== $name"
    [[ " $parts " != *" profile "* ]] || words+=(--trace "$out/trace.json")
    "$PYTHON" -m rating_train bench "$config" --rounds "$rounds" --steps "$steps" --json "$out/$name.json" \
        "${words[@]}" 2>"$out/$name.log" || { rt_say "   failed: $(tail -n 1 "$out/$name.log")"; return; }
    results+=("$out/$name.json")
}

if [[ -n "$cpu" ]]; then
    measure cpu "loader forward step train profile" model.backbone=synthetic zero.stage=0 train.device=cpu \
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
    measure profile_stage1_64 "profile" zero.stage=1 batch.global_items=64
fi
((${#results[@]})) || rt_die "nothing could be measured; why is in $out/*.log"

# peers STAGE STEPS NAMES SETTING...: this project and others in turn, on listings that are made for it.
peers() {
    local stage="$1" steps="$2" names="$3" words=() part
    shift 3
    for part in model.freeze=[] "data.path=$data/shards" "model.tokenizer=$data/demo/model" model.weights=random "$@" \
        ${settings[@]+"${settings[@]}"}; do words+=(--set "$part"); done
    rt_say "== peers"
    "$PYTHON" "$root/benchmarks/peers/run.py" "$config" --ranks 1 --rounds "$peer_rounds" --steps "$steps" \
        --warmup "$steps" --stages "$stage" --only "$names" --json "$out/peers.json" "${words[@]}" 2>"$out/peers.log" ||
        { rt_say "   failed: $(tail -n 1 "$out/peers.log")"; return; }
    results+=("$out/peers.json")
}

data="$(mktemp -d)"
trap 'rm -rf -- "$data"' EXIT
image_px=384 listings=600 peer_rounds=2
[[ -z "$cpu" ]] || image_px=64 listings=60 peer_rounds=1
{
    "$PYTHON" -m rating_train demo --out "$data/demo" --items "$listings"
    "$PYTHON" -m rating_train prepare --source "$data/demo/catalogue/catalogue.jsonl" --images "$data/demo/catalogue" \
        --out "$data/shards" --image-size-px "$image_px"
} >"$out/peers.log" 2>&1 || rt_die "no listings could be made: $(tail -n 1 "$out/peers.log")"
if [[ -n "$cpu" ]]; then
    peers 0 2 "rating_train stage 0,DDP" "model.backbone=$data/demo/model" train.device=cpu batch.global_items=4
else
    names="rating_train stage 1,rating_train stage 1 padded,DDP"
    "$PYTHON" -c 'import accelerate' 2>/dev/null && names+=",Trainer"
    peers 1 8 "$names" batch.global_items=64
fi
"$PYTHON" "$root/benchmarks/bench_table.py" "${results[@]}"
