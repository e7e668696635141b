"""Every kernel compiles for CUDA devices, which the interpreter does not show: to machine code, without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from triton.backends import backends

SHARED_MEMORY = 99 * 1024
"""What a program may use on every device since compute capability 8.0."""

PROGRAM = textwrap.dedent(
    """
    import json, pathlib, re, subprocess, sys
    import triton, triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from lethe_sglang.kernels.table import NEVER, ROUND, column
    from lethe_sglang.kernels.triton import indices, likeness, places, repack, rounds, score, select, start_states

    def build(name, ours, pointers, constants, floats=()):
        kernel, config = ours.function, ours.configs[0]
        constants = {name: value for name, value in {**constants, **config.kwargs}.items() if name in kernel.arg_names}
        def kind(argument):
            if argument in constants:
                return "constexpr"
            if isinstance(pointers.get(argument), tuple):
                return pointers[argument]
            return "*" + pointers[argument] if argument in pointers else "fp32" if argument in floats else "i32"
        signature = {argument: kind(argument) for argument in kernel.arg_names}
        paths = [path for i, a in enumerate(kernel.arg_names) if a in pointers and a not in constants
                 for path in ([(i, j) for j in range(5)] if isinstance(kind(a), tuple) else [(i,)])]
        aligned = {path: [["tt.divisibility", 16]] for path in paths}
        target = GPUTarget("cuda", int(sys.argv[1]), 32)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        made = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
        pathlib.Path(binary).write_bytes(made.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
        built[name] = {"shared": made.metadata.shared, "binary": len(made.asm["cubin"]),
                       "asynchronous": "cp.async" in made.asm["ptx"],
                       "spilled": int(re.search(r"STACK:(\\d+)", usage)[1])}

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary, built, rows = sys.argv[2], {}, {"rows": "i64", "seq_lens": "i64"}
    tables = {"req_to_token": "i32", "table": "i32", **rows, "indptr": "i32", "indices": "i32"}
    columns = {name.upper(): column(name, 28) for name in ("prefix", "tail", "kept", "packed", "excess", "holes")}
    for fill, flat in ((True, True), (False, True), (True, False), (False, False)):
        constants = {**columns, "LAYERS": 28, "FLAT": flat, "FILL_INDPTR": fill, "BATCH": 64}
        build(f"fill-{fill}-{flat}", indices._KERNEL, tables, constants)
    for page in (1, 16):
        packed = {"req_to_token": "i32", "table": "i32", **rows, "lengths": "i32", "pages": "i32"}
        build(f"pages-{page}", indices._PAGES, packed, {**columns, "PAGE": page})
    for recurs in (True, False):
        written = {"score": "fp32", "memory": "fp32", "slots": "i64", "positions": "i64"}
        build(f"start-{recurs}", start_states._KERNEL, written, {} if recurs else {"positions": None})
    chosen = {"rank": "fp32", "valid": "u8", "pinned": "i32", "count": "i32", "chosen": "u8"}
    build("select", select._KERNEL, chosen, {})
    tables = {"req_to_token": "i32", "table": "i32", "cells": "i32"}
    columns = {name.upper(): ROUND.column(name, 28) for name in (*ROUND.single, *ROUND.per_layer)}
    stores = {"scores": "fp32", "positions": "i32", "memories": "fp32"}
    states = {"valid": "i8", "score": "fp32", "position": "i32", "memory": "fp32"}
    build("gather", rounds._GATHER, {**tables, **stores, **states}, {**columns, "LAYERS": 28})
    build("rewrite", rounds._REWRITE, {**tables, "freed": "i64"}, columns)
    moved = {name: "i32" for name in ("gaps", "source", "destination", "written")}
    moved |= {"keep": "i8", "mass": "fp32"}
    build("place", rounds._PLACE, {**tables, **stores, **states, **moved}, {**columns, "LAYERS": 28})
    words = {name: ("*i32",) * 5 for name in ("buffers", "scratches")}
    for scatter in (True, False):
        build(f"repack-{scatter}", repack._KERNEL, {**words, "source": "i64", "destination": "i64"},
              {"WIDTHS": (256, 256, 1, 1, 17), "SCATTER": scatter})
    columns = {name.upper(): column(name, 28) for name in ("score_from", "score_after")}
    build("schedule", score._SCHEDULE, {"table": "i32", **rows, "first": "i32", "decay": "fp32"},
          {**columns, "NEVER": NEVER, "WINDOW": True}, ["step_decay"])
    states = {"lse": "fp32", "indptr": "i32", "indices": "i32", "first": "i32", "decay": "fp32", "step": "i64",
              "scores": "fp32", "memories": "fp32", "parts": "i32"}
    cases = [("bf16", "bf16", tl.bfloat16, 128, 7, 0), ("fp16", "fp16", tl.float16, 96, 1, 1),
             ("bf16", "fp8e5", tl.bfloat16, 64, 16, 2), ("fp32", "fp32", tl.float32, 256, 2, 0)]
    if int(sys.argv[1]) >= 89:
        cases.append(("bf16", "fp8e4nv", tl.bfloat16, 128, 4, 0))
    for query, keys, compute, dim, group, rule in cases:
        constants = {"RULE": rule, "KV_HEADS": 4, "MULTIPLE": 32, "PARTS_PAD": 8,
                     **({} if rule else {"parts": None}), "GROUP": group, "HEAD_DIM": dim, "GROUP_PAD": 16,
                     "DIM_PAD": triton.next_power_of_2(dim), "COMPUTE": compute}
        build(f"score-{query}-{keys}-{dim}-{group}-{rule}", score._SCORE, {"query": query, "keys": keys, **states},
              constants, ["logit_scale", "lse_scale", "threshold"])
    looked_at = {"cells": "i32", "valid": "u8", "likeness": "fp32"}
    for keys, dim in [("bf16", 128), ("fp8e5", 80), ("fp32", 256)]:
        constants = {"KV_HEADS": 8, "HEAD_DIM": dim, "DIM_PAD": triton.next_power_of_2(dim)}
        build(f"likeness-{keys}-{dim}", likeness._KERNEL, {"keys": keys, **looked_at}, constants)
    lists = {"score": "i32", "likeness": "i32", "valid": "u8", "parts": "i64"}
    build("sort", places._SORT, lists, {"PART": places.PART})
    build("better-place", places._KERNEL, {**lists, "rank": "fp32"}, {"BEHIND": places.BEHIND}, ["by_score", "by_key"])
    print(json.dumps(built))
    """
)


@pytest.mark.skipif("nvidia" not in backends, reason="this Triton has no CUDA back end")
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(tmp_path, capability):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(capability), str(tmp_path / "cubin")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    built = json.loads(run.stdout.splitlines()[-1])
    assert len(built) == 24 + (capability >= 89)
    assert all(kernel["binary"] for kernel in built.values())
    assert {name: kernel["shared"] for name, kernel in built.items() if kernel["shared"] > SHARED_MEMORY} == {}
    assert {
        name: kernel["spilled"] for name, kernel in built.items() if kernel["spilled"] and name[:5] != "score"
    } == {}
    loops = {name: kernel["asynchronous"] for name, kernel in built.items() if name.startswith(("score", "likeness"))}
    assert all(loops.values()), f"keys are not loaded ahead of their use: {loops}"
