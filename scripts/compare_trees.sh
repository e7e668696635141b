#!/usr/bin/env bash
# What the same work costs two checkouts: a server of each, at the same time on the same core, so that what else the machine
# does disturbs both alike. Compared is the CPU time of their schedulers from when the servers are ready.
#   bash scripts/compare_trees.sh OLD NEW OUT [CORE]     prints new / old of every repeat and the median, pool full and pool ample
# Both run in this checkout's environment; OLD and NEW are folders with a lethe_sglang each. OUT keeps every bench.json and
# compare-trees.jsonl.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export ROOT OMP_NUM_THREADS=1
python - "$(realpath "$1")" "$(realpath "$2")" "$(realpath -m "$3")" "${4:-0}" <<'PYTHON'
import json, os, statistics, subprocess, sys, time
from pathlib import Path

import psutil

trees, out, core = dict(zip(("old", "new"), sys.argv[1:3])), Path(sys.argv[3]), sys.argv[4]
out.mkdir(parents=True, exist_ok=True)


def start(tree, port, pool, tokens, folder):
    log = (out / f"{folder.name}.log").open("w")
    command = ["taskset", "-c", core, "lethe", "bench", "--model-path", f"{os.environ['ROOT']}/models/reasoner-dev"]
    command += "--budget 192 --interval 32 --input-len 64 --requests 32 --concurrency 32 --repeats 1".split()
    command += ["--arms", "lethe", "--seed", "1", "--timeout", "3600", "--port", str(port), "--out", str(folder)]
    command += ["--output-len", str(tokens), "--max-total-tokens", str(pool)]
    environment = {**os.environ, "PYTHONPATH": trees[tree]}
    return subprocess.Popen(command, cwd=trees[tree], env=environment, stdout=log, stderr=subprocess.STDOUT)


def seconds(bench):
    """CPU time of the scheduler below a process so far, None if it has none."""
    try:
        below = psutil.Process(bench.pid).children(recursive=True)
        (times,) = [p.cpu_times() for p in below if "sglang::schedul" in " ".join(p.cmdline())]
    except (psutil.Error, ValueError):
        return None
    return times.user + times.system


def run(repeat, pool, tokens):
    """Both at once; returns what each scheduler computed from "ready" to its end."""
    order = ("old", "new") if repeat % 2 else ("new", "old")
    folders = {tree: out / f"{tree}-{pool}-{repeat}" for tree in order}
    benches = {tree: start(tree, 31000 + 1000 * n, pool, tokens, folders[tree]) for n, tree in enumerate(order)}
    ready, last = {}, {}
    while any(bench.poll() is None for bench in benches.values()):
        time.sleep(0.05)
        for tree, bench in benches.items():
            if (now := seconds(bench)) is not None:
                last[tree] = now
                if tree not in ready and "ready after" in (out / f"{folders[tree].name}.log").read_text():
                    ready[tree] = now
    return {tree: last[tree] - ready[tree] for tree in trees}


for pool, tokens in ((4096, 1024), (36000, 512)):
    ratios = []
    for repeat in (1, 2, 3):
        spent = run(repeat, pool, tokens)
        ratios.append(spent["new"] / spent["old"])
        line = {"pool": pool, "repeat": repeat, "new_over_old": round(ratios[-1], 4)}
        for tree in trees:
            (found,) = json.loads((out / f"{tree}-{pool}-{repeat}" / "bench.json").read_text())["measurements"]
            line[f"{tree}_share_in_rounds"] = round(found["lethe"]["round_seconds"] / found["times"]["duration"], 4)
        with (out / "compare-trees.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        print(json.dumps(line), flush=True)
    print(f"pool {pool}: new / old, median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
PYTHON
