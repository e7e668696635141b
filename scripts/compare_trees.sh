#!/usr/bin/env bash
# Throughput of two checkouts, interleaved: one server of each after the other, which begins in turn.
#   bash scripts/compare_trees.sh OLD NEW OUT     prints new / old of every repeat and the median, pool full and pool ample
# Both run in this checkout's environment; OLD and NEW are folders with a lethe_sglang each. OUT keeps every bench.json.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
old=$(realpath "$1") new=$(realpath "$2") out=$(realpath -m "$3")

measure() { # tree pool tokens folder
  (cd "$1" && PYTHONPATH=$1 lethe bench --model-path "$ROOT/models/reasoner-dev" --budget 192 --interval 32 --input-len 64 \
    --output-len "$3" --requests 32 --concurrency 32 --max-total-tokens "$2" --repeats 1 --arms lethe --seed 1 \
    --timeout 3600 --out "$out/$4" >&2)
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
python - "$out" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

def speed(folder):
    (found,) = json.loads((Path(sys.argv[1]) / folder / "bench.json").read_text())["measurements"]
    return found["times"]["output_throughput"]

for pool in (4096, 36000):
    ratios = sorted(speed(f"new-{pool}-{repeat}") / speed(f"old-{pool}-{repeat}") for repeat in (1, 2, 3))
    print(f"pool {pool}: new / old {', '.join(f'{ratio:.3f}' for ratio in ratios)}; median {statistics.median(ratios):.3f}")
PYTHON
