#!/usr/bin/env bash
# Throughput of two checkouts, interleaved: one server of each after the other, which begins in turn.
#   bash scripts/compare_trees.sh OLD NEW OUT     prints old / new of every repeat, pool full and pool ample
# Both run in this checkout's environment; OLD and NEW are folders with a lethe_sglang each.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
old=$(realpath "$1") new=$(realpath "$2") out=$(realpath -m "$3")

measure() { # tree pool tokens folder
  (cd "$1" && PYTHONPATH=$1 lethe bench --model-path "$ROOT/models/reasoner-dev" --budget 192 --interval 32 --input-len 64 \
    --output-len "$3" --requests 32 --concurrency 32 --max-total-tokens "$2" --repeats 1 --arms lethe --seed 1 \
    --timeout 3600 --out "$out/$4" | grep 'tokens/s' | sed "s#^#$4: #")
}

for repeat in 1 2 3; do
  trees=("old $old" "new $new")
  ((repeat % 2)) || trees=("new $new" "old $old")
  for setting in "4096 1024" "36000 512"; do
    for tree in "${trees[@]}"; do
      read -r pool tokens <<<"$setting"
      measure "${tree#* }" "$pool" "$tokens" "${tree%% *}-$pool-$repeat"
    done
  done
done
