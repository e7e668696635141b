#!/usr/bin/env python3

"""Break the code on purpose, one place at a time, on a copy of the tree, and see the named tests go red.

python tests/mutants.py [--engine] [--jobs N] [NAME ...]     without --engine only those whose tests start no server
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """``old`` becomes ``new`` in ``file``; then ``tests`` must fail."""

    file: str
    old: str
    new: str
    tests: str
    engine: bool = False


SECTION, REGISTRY = "lethe_sglang/config/policy_section.py", "lethe_sglang/policies/registry.py"
CONFIG = "tests/unit/test_config.py"
FEATURES, REF = "lethe_sglang/policies/features.py", "tests/unit/test_dense_reference.py"
ROUNDS, LEDGER, LIFE = (
    "lethe_sglang/cache/rounds.py",
    "lethe_sglang/cache/ledger.py",
    "lethe_sglang/engine/lifecycle.py",
)
COMMON, REFERENCE = "lethe_sglang/kernels/common.py", "lethe_sglang/kernels/reference.py"
SCORED, PHASE = "lethe_sglang/attention/scored.py", "tests/unit/test_phase.py"
PLACES = "lethe_sglang/kernels/reference_round.py"
LIKENESS = "lethe_sglang/kernels/triton/likeness.py"
BETTER = "lethe_sglang/kernels/triton/places.py"
UNIT, SERVE = "tests/unit/test_rounds.py", "tests/engine/test_serving.py"
ARTIFACT, MEASURE, CACHE = (
    "tests/unit/test_profile_artifact.py",
    "tests/unit/test_measure.py",
    "tests/unit/test_profile_cache.py",
)
ALLOCATOR, BUDGETS = "lethe_sglang/allocation/budgets.py", "tests/unit/test_budgets.py"
LIVE, RULES = "tests/unit/test_reconfigure.py", "lethe_sglang/engine/reconfigure.py"
POLICIES = "tests/unit/test_policies.py"
GRAPHS = "tests/engine/test_refusals.py -k decode_graphs"
LAUNCH, DISPATCH = "lethe_sglang/kernels/triton/__init__.py", "tests/kernels/test_dispatch.py"
GOAL, GOALS = "lethe_bench/gpu/goal.py", "tests/bench/test_gpu_goals.py"
OBSERVED = "tests/unit/test_observed_backends.py"
RECONF = "tests/engine/test_reconfigure.py"
REPLAY, REPLAYED = "lethe_bench/fidelity/replay.py", "tests/bench/test_replay.py"
FLASH, PAGED = "tests/unit/test_flashattention_backend.py", "lethe_sglang/attention/flashattention.py"
PAGE8 = f"{SERVE} -k page8"
STORM = "tests/engine/test_pressure.py -k storm"
LOAD, LOADED = "lethe_bench/load/run.py", "tests/bench/test_load.py"
SOAK, SOAKED, JUDGED = "lethe_bench/soak/run.py", "tests/bench/test_soak.py", "lethe_bench/soak/verdict.py"
FORCED, AT_ONCE = "lethe_bench/fidelity/run.py", "tests/bench/test_fidelity_loads.py"
PATHS, TRAJECTORY = "tests/bench/test_trajectory.py", "lethe_bench/fidelity/trajectory.py"
PRESSURE, ADMISSION, SHARES = (
    "lethe_sglang/engine/pressure.py",
    "lethe_sglang/engine/admission.py",
    "lethe_sglang/cache/shares.py",
)
METRICS, SCRAPED = "lethe_sglang/engine/metrics.py", "tests/unit/test_metrics.py"
REPLIES, REPLIED = "lethe_sglang/engine/replies.py", "tests/unit/test_replies.py"
TOP, FRAME = "lethe_sglang/cli/top.py", "tests/unit/test_top.py"
MACHINE, SHARED = "tests/unit/test_state_machine.py", "tests/unit/test_shares.py"
MONITOR, QUALITY, WATCHED = (
    "lethe_sglang/engine/monitor.py",
    "lethe_sglang/engine/quality.py",
    "tests/unit/test_monitor.py",
)
MUTANTS = {
    "sinks are not pinned": Mutant(ROUNDS, "n.pinned.expand(rank", "(0 * n.pinned).expand(rank", UNIT),
    "blocks that moved are freed": Mutant(
        PLACES,
        "freed.append(blocks[packed:])",
        "freed.append(blocks[: len(blocks) - packed])",
        UNIT,
    ),
    "a shrunk request keeps its blocks": Mutant(
        PLACES,
        "entries[prefix : prefix + old_packed]",
        "entries[prefix : prefix + min(old_packed, packed)]",
        f"{UNIT} -k shrink",
    ),
    "a cell moves to where another stays": Mutant(
        PLACES, "home[leaves & (excess < 0)] = vacant.nonzero()[2]", "home[leaves & (excess < 0)] = 0", UNIT
    ),
    "a cell that has to move stays": Mutant(PLACES, "stays = keep & (home < room) &", "stays = keep &", UNIT),
    "a cell in a hole is taken for one at home": Mutant(
        PLACES, " & ((j < old_packed) | (j >= old_kept))\n", "\n", UNIT
    ),
    "moved cells skip a hole": Mutant(PLACES, "n.excess.T[:, :, None] + excess, 0)", "excess, 0)", UNIT),
    "excess is read from the wrong hole": Mutant(
        COMMON, "number = asked.excess.t()", "number = 0 * asked.excess.t()", UNIT
    ),
    "a round reads excess from the wrong hole": Mutant(
        PLACES, "n.old_excess.T[:, :, None] + place, 0)", "place, 0)", UNIT
    ),
    "a narrow layer has excess": Mutant(
        "lethe_sglang/cache/layout.py",
        "max(ceil_div(sum(kept), len(kept)), largest)",
        "ceil_div(sum(kept), len(kept))",
        "tests/unit/test_layout.py",
    ),
    "a policy sees candidates as they are stored": Mutant(
        ROUNDS,
        "order = in_time(candidate) if policy.uses_position else None",
        "order = None",
        f"{REF} -k lazy",
    ),
    "what was chosen in order of time is taken as stored": Mutant(
        ROUNDS, "n.kept.t()), order)", "n.kept.t()), None)", f"{REF} -k streaming"
    ),
    "memory is stored in order of time": Mutant(ROUNDS, "as_stored(remembered, order)", "remembered", f"{REF} -k gkv"),
    "a narrow class may come to have excess": Mutant(
        "lethe_sglang/attention/length_classes.py",
        "and (narrow[layers[0]] or not shares)",
        "and True",
        "tests/unit/test_flashinfer_backend.py -k serve",
    ),
    "narrow and wide classes share a buffer": Mutant(
        "lethe_sglang/attention/length_classes.py",
        "shared.index(n) if n in shared else len(shared)",
        "0",
        "tests/unit/test_triton_backend.py -k equal",
    ),
    "a list of slots is read as one of cells": Mutant(
        "lethe_sglang/attention/scored.py",
        "self.pool.cells.of_layer(layer) if narrow else",
        "",
        "tests/unit/test_triton_backend.py -k equal",
    ),
    "rows may be rewritten before a layer has read them": Mutant(
        "lethe_sglang/attention/scored.py",
        "IN_REPLAY if shared else",
        "IN_REPLAY if True else",
        "tests/unit/test_triton_backend.py -k graphs_head",
    ),
    "layers that keep different numbers share a CPU's list": Mutant(
        "lethe_sglang/attention/torch_native.py",
        "groups.setdefault(kept, [])",
        "groups.setdefault((), [])",
        "tests/unit/test_flashinfer_backend.py -k equal",
    ),
    "a plan is written over one that is on its way": Mutant(
        "lethe_sglang/attention/flashinfer.py",
        "self.copied[self.turn].synchronize()",
        "pass",
        "tests/unit/test_flashinfer_backend.py -k overwritten",
    ),
    "the single plan's kernel reads indptr early": Mutant(
        "lethe_sglang/attention/flashinfer.py",
        "enable_pdl=False",
        "enable_pdl=None",
        "tests/unit/test_flashinfer_backend.py -k equal",
    ),
    "the first decode step scores the shared prefix": Mutant(
        LIFE, "announce(row, prefix if", "announce(row, 0 if", "tests/unit/test_backend_factories.py -k first_decode"
    ),
    "parts that are not in use count": Mutant(
        "lethe_sglang/kernels/triton/score.py",
        "(heads >= GROUP)[:, None] | (p < used)[None, :], some,",
        "(heads >= GROUP)[:, None] | (p < 99)[None, :], some,",
        "tests/kernels/test_triton_score.py -k parts",
    ),
    "a launch counts kept cells alone": Mutant(
        ROUNDS, "kept * a_cell + (sizes[-1] + 1)", "kept * a_cell + 0 * (sizes[-1] + 1)", f"{UNIT} -k memory"
    ),
    "every chunk of a prefill is observed": Mutant(
        LIFE, "req.extend_end == length > prefix", "length > prefix", "tests/unit/test_backend_factories.py -k chunk"
    ),
    "a chunk of keys is normalised by itself": Mutant(
        "lethe_sglang/attention/prefill.py",
        "- total).exp_()",
        "- logits(start).logsumexp(-1, True)).exp_()",
        "tests/unit/test_score.py -k chunks",
    ),
    "a GPU's kernel places cells in stored order": Mutant(
        "lethe_sglang/kernels/triton/rounds.py",
        "vacant = ((i < room) & ~taken)",
        "vacant = (i < room)",
        "tests/kernels/test_triton_rounds.py",
    ),
    "a round drops of what it keeps": Mutant(
        PLACES,
        "for those in (candidate.valid.numpy(), kept)",
        "for those in (kept, kept)",
        UNIT,
    ),
    "a GPU sums scores beyond a layer's candidates": Mutant(
        "lethe_sglang/kernels/triton/rounds.py",
        "mask=j < own, other=0.0)",
        "mask=j < width, other=0.0)",
        "tests/kernels/test_triton_rounds.py -k references",
    ),
    "sums that have not arrived are read": Mutant(
        "lethe_sglang/engine/dropped.py", "self._coming[0][1].query()", "True", SCRAPED
    ),
    "times are summed as scores": Mutant(
        ROUNDS,
        'gathers = rule is not None and rule.rule != "recurrence"',
        "gathers = rule is not None",
        "tests/unit/test_rounds.py -k lack_of_a_score",
    ),
    "a GPU's rows keep dead entries": Mutant(
        "lethe_sglang/kernels/triton/rounds.py",
        "range(prefix + packed, tail, BLOCK)",
        "range(prefix + packed + 1, tail, BLOCK)",
        "tests/kernels/test_triton_rounds.py",
    ),
    "a GPU's candidates in holes are looked up at home": Mutant(
        "lethe_sglang/kernels/triton/rounds.py",
        "base = tl.where(away, owner * blocks, base)\n    cell",
        "cell",
        "tests/kernels/test_triton_rounds.py",
    ),
    "a GPU's mean key is of raw keys": Mutant(
        LIKENESS, "total += k / tl.maximum(norm, 1e-12)[:, None]", "total += k", "tests/kernels/test_triton_likeness.py"
    ),
    "a GPU looks at keys beyond a layer's candidates": Mutant(
        LIKENESS,
        "there = tl.load(valid + j, mask=j < width, other=0) != 0",
        "there = j < width",
        "tests/kernels/test_triton_likeness.py",
    ),
    "a GPU's likeness is that of the last head": Mutant(
        LIKENESS, "before + cosine / KV_HEADS", "cosine / KV_HEADS", "tests/kernels/test_triton_likeness.py"
    ),
    "a GPU's keys lie within 32 bits": Mutant(
        LIKENESS,
        "cell = tl.load(cells + j, mask=there, other=0).to(tl.int64)",
        "cell = tl.load(cells + j, mask=there, other=0).to(tl.int32)",
        "tests/kernels/test_triton_likeness.py -k 32_bits",
    ),
    "what lies in a cell of padding counts": Mutant(
        PLACES, "unit.masked_fill_(absent, 0.0)", "pass", "tests/kernels/test_triton_likeness.py -k references"
    ),
    "a policy sees what lies in a cell of padding": Mutant(
        FEATURES, ".masked_fill_(~valid[:, :, None, None], 0.0)", "", "tests/unit/test_policies.py -k memory"
    ),
    "keys of all requests are compared at once": Mutant(
        FEATURES, "AT_ONCE // max(", "2**60 // max(", "tests/unit/test_policies.py -k memory"
    ),
    "a policy's own feature is passed over": Mutant(
        ROUNDS, "type(policy).key_feature is Policy.key_feature", "True", f"{REF} -k rkv"
    ),
    "likeness takes a launch a layer": Mutant(
        ROUNDS, "type(policy).key_feature is Policy.key_feature", "False", "tests/bench/test_counts.py -k keydiff"
    ),
    "a GPU's ties go to the earlier candidate": Mutant(
        BETTER, "(order << 32) | j,", "(order << 32) | (n - j),", "tests/kernels/test_triton_places.py -k tie"
    ),
    "a GPU's place is that in a list's last part": Mutant(
        BETTER, "place += above", "place = above", "tests/kernels/test_triton_places.py -k twins"
    ),
    "a GPU sorts what a policy ranks by places with torch": Mutant(
        ROUNDS, "        better_place=kernels.better_place,\n", "", "tests/bench/test_counts.py -k whole"
    ),
    "places ascend": Mutant(
        PLACES,
        "torch.arange(lists.shape[-1] - 1, -1, -1,",
        "torch.arange(0, lists.shape[-1], 1,",
        f"{REF} -k default",
    ),
    "what a policy's author reads is another rank": Mutant(
        FEATURES, "torch.arange(n - 1, -1, -1,", "torch.arange(0, n, 1,", "tests/kernels/test_triton_places.py -k twins"
    ),
    "NaN ranks by its sign": Mutant(
        PLACES,
        "np.where(np.isnan(values), np.float32(np.nan), values) + np.float32(0)",
        "values + np.float32(0)",
        "tests/kernels/test_triton_places.py -k patterns",
    ),
    "a layer that comes to be narrow is packed so at once": Mutant(
        "lethe_sglang/cache/layout.py", "[is_narrow and k <= packed for", "[is_narrow for", f"{UNIT} -k comes_to_be"
    ),
    "the bound is the mean's": Mutant(
        "lethe_sglang/engine/runtime.py", "self.config.recent + most) + rest", "0) + rest", f"{UNIT} -k rounding"
    ),
    "eager splits follow the sequence": Mutant(
        "lethe_sglang/attention/triton.py",
        "self.get_num_kv_splits(self.forward_metadata.num_kv_splits, longest)",
        "pass",
        "tests/unit/test_triton_backend.py -k longest",
    ),
    "rows of indptr begin anywhere": Mutant(
        "lethe_sglang/attention/flashinfer.py",
        "width = 4 * ceil_div(max_batch + 1, 4)",
        "width = max_batch + 1",
        "tests/unit/test_flashinfer_backend.py -k aligned",
    ),
    "SGLang picks the deterministic backend": Mutant(
        "lethe_sglang/engine/entrypoints.py",
        "view.enable_deterministic_inference or view.rl_on_policy_target",
        "False",
        "tests/engine/test_refusals.py -k deterministic",
    ),
    "kernels compile on a request's row": Mutant(
        "lethe_sglang/engine/runtime.py",
        'rid="", row=0,',
        'rid="", row=1,',
        "tests/unit/test_backend_factories.py -k compiles",
    ),
    "graphs of metadata are let through": Mutant(
        "lethe_sglang/engine/guard.py",
        '("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "it',
        '("SGLANG_ENABLE_METADATA_GLUE_GRAPHS", "it',
        "tests/engine/test_refusals.py -k environment",
    ),
    "a hole is looked up one too far": Mutant(
        "lethe_sglang/kernels/triton/indices.py",
        "(number >= tl.load(line + HOLES",
        "(number > tl.load(line + HOLES",
        "tests/kernels/test_triton_indices.py",
    ),
    "states stay behind": Mutant(ROUNDS, "if name not in made]", "if name not in {*made, 'score'}]", UNIT),
    "ties go to the earlier token": Mutant(
        REFERENCE,
        "best_last = torch.from_numpy(ascending(",
        "best_last = torch.from_numpy((lambda key: len(place) - 1 - key[..., ::-1].argsort(-1, kind='stable'))(",
        UNIT,
    ),
    "a kept prompt is charged to the budget": Mutant(
        "lethe_sglang/cache/layout.py", "max(tree, page_floor(prompt, page_size))", "tree", f"{UNIT} -k kept_prompt"
    ),
    "the rest of the prompt's last page is a candidate": Mutant(
        "lethe_sglang/cache/layout.py", "max(sinks - prefix, rest + own_sinks)", "max(sinks - prefix, own_sinks)", UNIT
    ),
    "admission forgets a prompt that the tree does not own": Mutant(
        "lethe_sglang/engine/runtime.py", "bound = prefix - tree + request", "bound = request", f"{UNIT} -k bound"
    ),
    "breakpoint forgets the rest of the prompt": Mutant(
        "lethe_sglang/cache/breakpoints.py", "floor + state.rest", "floor", "tests/unit/test_breakpoint.py -k rest"
    ),
    "a waiting request is read after a change": Mutant(
        "lethe_sglang/engine/runtime.py",
        "        self.override_of(req)  # read",
        "        pass  # read",
        "tests/unit/test_reconfigure.py -k waits",
    ),
    "default parameters are not looked at": Mutant(
        "lethe_sglang/engine/guard.py",
        "check_request(preferred or {})",
        "return",
        "tests/engine/test_refusals.py -k option_to_change",
    ),
    "a beam is evicted from": Mutant(
        "lethe_sglang/engine/runtime.py",
        ' == "on" and req.beam_group is None',
        ' == "on"',
        "tests/engine/test_hostile_requests.py -k beam",
        True,
    ),
    "an illegal override is the scheduler's error": Mutant(
        LIFE,
        "req.set_finish_with_abort(str(error))",
        "raise",
        "tests/engine/test_hostile_requests.py -k override",
        True,
    ),
    "the recent window shrinks": Mutant(
        LEDGER, "committed - self.recent, self.page_size", "committed, self.page_size", UNIT
    ),
    "rounds ignore their interval": Mutant(LEDGER, "max(self.interval, room + 1)", "room + 1", UNIT),
    "the device table is not written": Mutant(LEDGER, "= new[:, 1:]", "= 0 * new[:, 1:]", UNIT),
    "scores do not decay": Mutant(COMMON, ".mul_(decay).add_", ".add_", "tests/unit/test_score.py"),
    "the breakpoint ignores the mean": Mutant(
        "lethe_sglang/allocation/breakpoint.py", "if total > limit:", "if False:", "tests/unit/test_breakpoint.py"
    ),
    "an upward import": Mutant(
        "lethe_sglang/cache/layout.py",
        "from functools import lru_cache",
        "from functools import lru_cache\nimport lethe_sglang.engine.compat",
        "tests/unit/test_architecture.py",
    ),
    "the memory is not renewed": Mutant(ROUNDS, "candidate._replace(memory=remembered)", "candidate", f"{REF} -k gkv"),
    "windows reach behind a round": Mutant(
        LEDGER, "max(state.due_at - self.window, committed)", "state.due_at - self.window", f"{REF} -k snapkv"
    ),
    "every near-duplicate is redundant": Mutant(FEATURES, "place == latest", "place < 0", f"{REF} -k rkv"),
    "importance is not remembered": Mutant(
        "lethe_sglang/policies/gkv.py", ").maximum(f)", " * 0).maximum(f)", f"{REF} -k gkv"
    ),
    "the section of another policy is taken": Mutant(
        SECTION, "if other != name and other in policy_names()", "if False", CONFIG
    ),
    "the old policy's section stays": Mutant(SECTION, "merged.pop(before, None)", "pass", CONFIG),
    "the policy's options are not dumped": Mutant(
        SECTION, "**({self.policy: options} if options else {})", "**{}", CONFIG
    ),
    "old keys are unknown keys": Mutant("lethe_sglang/config/errors.py", "replaced_key(path, given) or [", "[", CONFIG),
    "old values are illegal values": Mutant(
        "lethe_sglang/config/errors.py", "replaced_value(path, given) or expected", "expected", CONFIG
    ),
    "a taken name is no error": Mutant(
        REGISTRY, "if others or name in RESERVED", "if name in RESERVED", "tests/unit/test_policies.py"
    ),
    "what is no policy is taken": Mutant(
        REGISTRY, "if problem := _problem(found)", "if problem := None", "tests/unit/test_policies.py"
    ),
    "redundancy is of who looks": Mutant(FEATURES, "cosine.sum(-2)", "cosine.sum(-1)", f"{REF} -k rkv"),
    "pooling takes the largest": Mutant(FEATURES, 'if how == "avg" else', "if False else", f"{REF} -k snapkv"),
    "max is a sum": Mutant(
        COMMON,
        "torch.maximum(score.mul_(decay), attention)",
        "score.mul_(decay).add(attention)",
        f"{REF} -k morphkv",
    ),
    "gaps are not remembered": Mutant(COMMON, "torch.maximum(memory, gap)", "gap", f"{REF} -k lazy"),
    "keys like the mean stay": Mutant(
        "lethe_sglang/policies/keydiff.py", "return -candidates", "return candidates", f"{REF} -k keydiff"
    ),
    "the shadow looks at keys only": Mutant(
        "lethe_bench/observers/shadow.py",
        '("value", copy[1], self.store.value)',
        '("value", copy[0], self.store.key)',
        "tests/unit/test_shadow.py",
    ),
    "the shadow does not mind a cell that is read twice": Mutant(
        "lethe_bench/observers/shadow.py",
        "good = once &",
        "good =",
        "tests/unit/test_shadow.py",
    ),
    "the shadow passes over prefixes": Mutant(
        "lethe_bench/observers/shadow.py", "own | ((j < prefix) & step.followed & there)", "own", OBSERVED
    ),
    "observers are shown no lists": Mutant(
        "lethe_sglang/attention/scored.py", "self._show_lists(layer, forward_batch, lists, narrow)", "pass", OBSERVED
    ),
    "observers take slots for cells": Mutant(
        "lethe_sglang/attention/scored.py",
        "flat = cells + layer * self.scored.pool",
        "flat = cells + 0 * self.scored.pool",
        OBSERVED,
    ),
    "every list begins where the first does": Mutant(
        REFERENCE,
        "lists.indices[torch.where(valid, begin + j, 0)]",
        "lists.indices[torch.where(valid, j, 0)]",
        OBSERVED,
    ),
    "the shadow looks on while prefills are replayed": Mutant(
        "lethe_sglang/engine/guard.py",
        'for phase in ("prefill", "decode"))',
        'for phase in ("decode",))',
        "tests/engine/test_refusals.py -k checks_that",
    ),
    "a list that a kernel fills is one off": Mutant(
        "lethe_sglang/kernels/triton/indices.py",
        "base + tl.load(entries + position,",
        "base + (j == 50) + tl.load(entries + position,",
        "tests/engine/test_cuda_backends.py",
        engine=True,
    ),
    "hoyer is not normalised": Mutant(
        "lethe_sglang/allocation/sparsity.py", "(root - 1).clamp(min=1e-6)", "root", "tests/unit/test_sparsity.py"
    ),
    "sparse layers get more": Mutant("lethe_sglang/allocation/rules.py", "[1 - h for h", "[h for h", ARTIFACT),
    "profiles of other heads pass": Mutant(
        "lethe_sglang/allocation/fingerprint.py", '    "kv_heads": "KV heads",\n', "", ARTIFACT
    ),
    "the rule of a profile is not asked": Mutant(
        "lethe_sglang/allocation/rules.py", "RULES[profile.rule]", 'RULES["concentration"]', ARTIFACT
    ),
    "alpha does nothing": Mutant("lethe_sglang/allocation/rules.py", "** profile.alpha", "", ARTIFACT),
    "a sensitivity is added to another model's profile": Mutant(
        "lethe_bench/one_layer.py",
        'profile.check(model_of(engine), "FILE")',
        "model_of(engine)",
        "tests/bench/test_one_layer.py",
    ),
    "what --from would not read is passed over": Mutant(
        "lethe_bench/cli/profile.py", "    if unread:", "    if False:", ARTIFACT
    ),
    "--kv-evict-profile none leaves an allocation that needs one": Mutant(
        "lethe_sglang/config/loading.py",
        """if profile == "none" and section.get""",
        "if False and section.get",
        ARTIFACT,
    ),
    "shares have no bounds": Mutant(
        ALLOCATOR,
        "min(max(factor * weight, low), high) for weight in exact",
        "factor * weight for weight in exact",
        BUDGETS,
    ),
    "means of classes are rounded up": Mutant(
        ALLOCATOR, "sum(ordered[start:end]) // (end - start)", "-(-sum(ordered[start:end]) // (end - start))", BUDGETS
    ),
    "layers are cut into classes anywhere": Mutant(ALLOCATOR, "min((spent + cost(start, end)", "min((spent", BUDGETS),
    "a request's budget sinks below the floor": Mutant(
        ALLOCATOR, "max(floor, int(factor * tokens))", "int(factor * tokens)", BUDGETS
    ),
    "breakpoint does not read its profile": Mutant(
        "lethe_sglang/config/schema.py",
        'self.allocation == "breakpoint" and self.profile',
        "False and self.profile",
        BUDGETS,
    ),
    "the fresh process is told nothing": Mutant(
        "lethe_sglang/profiling/automatic.py", "pickle.dumps(request(server_args, path))", 'b""', CACHE
    ),
    "rows keep what they had measured": Mutant(
        "lethe_sglang/observers/measure.py", "tensor[:, row] = 0", "pass", MEASURE
    ),
    "a use is forgotten": Mutant(
        "lethe_sglang/observers/measure.py", "torch.where(used | (valid", "torch.where((valid", MEASURE
    ),
    "nobody locks the cache": Mutant(
        "lethe_sglang/profiling/cache.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN", CACHE
    ),
    "the lock's holder is not asked": Mutant(
        "lethe_sglang/profiling/cache.py",
        "if (found := _read(path, model)) is None:",
        "if (found := None) is None:",
        CACHE,
    ),
    "an interrupted pass starts over": Mutant(
        "lethe_sglang/profiling/run.py",
        "for n, r in partial.load().items()",
        "for n, r in {}.items()",
        "tests/unit/test_profiling.py",
    ),
    "a closed pipe is found at the interpreter's end": Mutant(
        "lethe_sglang/cli/main.py",
        "                    stream.flush()",
        "                    pass",
        "tests/unit/test_program.py -k reader",
    ),
    "any broken pipe is taken for a closed one": Mutant(
        "lethe_sglang/cli/main.py", "if not _readers_gone():", "if False:", "tests/unit/test_program.py -k hidden"
    ),
    "somebody else takes a command of ours": Mutant(
        "lethe_sglang/cli/main.py", "key=_ours, reverse=True", "key=_ours", "tests/unit/test_program.py -k takes_over"
    ),
    "a torn line stays": Mutant("lethe_sglang/files.py", "file.truncate(self", "abs(self", "tests/unit/test_files.py"),
    "flags of the plugin are passed on": Mutant(
        "lethe_bench/cli/server_args.py", 'name.startswith("--kv-evict")', "False", "tests/unit/test_files.py"
    ),
    "a missing test aid is passed over": Mutant(
        "lethe_sglang/observers/base.py",
        "raise ConfigError(",
        "return lambda *_, **__: Observer()\n    print(",
        "tests/unit/test_shadow.py",
    ),
    "the product imports the laboratory": Mutant(
        "lethe_sglang/observers/measure.py",
        "from __future__ import annotations",
        "from __future__ import annotations\nimport lethe_bench.servers",
        "tests/unit/test_architecture.py",
    ),
    "the prompt is not counted": Mutant(
        "lethe_bench/deployment.py", "return self.prompt + min(", "return min(", "tests/bench/test_plan.py"
    ),
    "fp8 keys are ranked as bytes": Mutant(
        ROUNDS, "made(cells.keys,", "made(cells.key,", "tests/unit/test_flashinfer_backend.py -k fp8"
    ),
    "a column is read by its number": Mutant(
        "lethe_sglang/kernels/triton/indices.py",
        "tl.load(line + TAIL, ",
        "tl.load(line + 1, ",
        "tests/kernels/test_table.py",
    ),
    "the twin reads a column by its number": Mutant(
        REFERENCE,
        "torch.where(scored, lines.score_from,",
        "torch.where(scored, table[rows, 2],",
        "tests/unit/test_table.py",
    ),
    "a round has a second upload": Mutant(
        ROUNDS,
        "n.pinned.expand(rank",
        "torch.tensor([p.pinned for p in plans], device=rank.device).expand(rank",
        "tests/unit/test_uploads.py",
    ),
    "the table is two uploads": Mutant(
        LEDGER,
        "= new[:, 1:]",
        "= new[:, 1:] * torch.ones(1, dtype=torch.int32).to(new.device)",
        "tests/unit/test_uploads.py",
    ),
    "a CPU's score takes all attention from the first list position on": Mutant(
        "lethe_sglang/attention/torch_native.py",
        "heads[:, :, self.first_scored :].mean(1)",
        "heads[:, :, : lists.scored.shape[-1]].mean(1)",
        "tests/unit/test_triton_backend.py -k every_rule",
    ),
    "a run that the limit cut has a verdict": Mutant(GOAL, "None if missing else all(", "all(", GOALS),
    "a server of somebody else is measured": Mutant(
        "lethe_bench/cli/gpu.py", "if not port_free(PORT):", "if False:", GOALS
    ),
    "a void sample counts": Mutant(GOAL, 'if s.get("void")', "if False", GOALS),
    "repeats are begun beyond the limit": Mutant(GOAL, "if limit.left <= needed:", "if not limit.left:", GOALS),
    "the longest stall is a median": Mutant(GOAL, "worst if self.of_each else", "worst if False else", GOALS),
    "a stall is a long step": Mutant("lethe_bench/gpu/steps.py", "time - statistics.median(", "time - 0 * len(", GOALS),
    "a pool with room counts as full": Mutant(
        "lethe_bench/gpu/goals.py", "if not min(step.waiting for step in steps):", "if False:", GOALS
    ),
    "rounds of a steady state are due at once": Mutant(
        "lethe_bench/gpu/goals.py", "BUDGET - age % INTERVAL", "BUDGET + 0 * age", GOALS
    ),
    "graphs that are named grow": Mutant(
        "lethe_sglang/engine/entrypoints.py", "or named or (batches", "or (batches", GRAPHS
    ),
    "the memory of larger graphs is not reckoned": Mutant(
        "lethe_sglang/engine/entrypoints.py", "larger, mem_fraction_static=fraction)", "larger)", GRAPHS
    ),
    "graphs are captured that no batch reaches": Mutant(
        "lethe_sglang/engine/graphs.py", "resolved.max_running_requests or MOST_CAPTURED", "MOST_CAPTURED", GRAPHS
    ),
    "a check is passed by a tensor of other strides": Mutant(
        LAUNCH, "tensor.shape, tensor.stride(), dtypes", "tensor.shape, (1,) * tensor.dim(), dtypes", DISPATCH
    ),
    "checks are made anew in every layer": Mutant(LAUNCH, "maxsize=4096", "maxsize=0", DISPATCH),
    "a launch takes the last configuration": Mutant(LAUNCH, "self.configs[0].all", "self.configs[-1].all", DISPATCH),
    "a configuration that is tried stays": Mutant(LAUNCH, "self.configs = known", "pass", DISPATCH),
    "a kernel's default is tried beside itself": Mutant(
        "lethe_bench/gpu/kernels.py", "KERNELS[name].configs[1:]", "KERNELS[name].configs", "tests/bench/test_gpu.py"
    ),
    "a bucket is below its number": Mutant(LAUNCH, "max(n - 1, 0).bit_length()", "n.bit_length() - 1", DISPATCH),
    "ranks do not compare what they kept": Mutant(
        "lethe_bench/observers/kept.py", "if len(set(digests)) > 1:", "if False:", "tests/unit/test_rank_agreement.py"
    ),
    "admission forgets what a request holds until its next round": Mutant(
        "lethe_sglang/engine/runtime.py",
        "        if state is None or self.ledger.on_demand:\n            return bound",
        "        if True:\n            return bound",
        LIVE,
    ),
    "a change leaves the next round where it was": Mutant(
        LEDGER,
        "state.thresholds = list(state.budgets)\n        state.due_at = self._due_at(state)",
        "state.thresholds = list(state.budgets)",
        LIVE,
    ),
    "a change throws a window's scores away": Mutant(LEDGER, "if not (goes_on and", "if not (False and", LIVE),
    "running requests never hear of a change": Mutant(
        "lethe_sglang/engine/runtime.py", "self.version += 1", "pass", LIVE
    ),
    "a busy server changes its policy": Mutant(RULES, "if idle and any(busy):", "if False:", LIVE),
    "a live server changes what the start settles": Mutant(RULES, "if fixed:", "if False:", LIVE),
    "a policy does without its states": Mutant(RULES, "if any(needed.values()):", "if False:", LIVE),
    "captured graphs are forgotten": Mutant(RULES, "if runtime.captured and", "if False and", LIVE),
    "plans of FlashInfer are forgotten": Mutant(RULES, " or not classes.serve(budgets)", "", LIVE),
    "a request is counted twice": Mutant(
        RULES, "running.add(scheduler.chunked_req)", "running = [*running, scheduler.chunked_req]", LIVE
    ),
    "the old policy's options outlive it": Mutant(
        "lethe_sglang/config/policy_section.py", "merged.pop(before, None)", "pass", "tests/unit/test_changes.py"
    ),
    "a request loses the budget it asked for": Mutant(
        "lethe_sglang/config/overrides.py", "if not self.own:", "if True:", "tests/unit/test_changes.py"
    ),
    "the score takes a log-sum-exp of another base": Mutant(
        "lethe_sglang/kernels/triton/score.py",
        '_LOG2_E if lse_base == "e" else 1.0,',
        "1.0,",
        "tests/engine/test_cuda_backends.py -k triton",
        True,
    ),
    "FlashInfer's log-sum-exp is taken for a natural one": Mutant(
        "lethe_sglang/attention/flashinfer.py",
        'cells, lse_base="2")',
        'cells, lse_base="e")',
        "tests/engine/test_cuda_backends.py -k flashinfer",
        True,
    ),
    "dead blocks are freed again at the end": Mutant(
        LIFE, "original(tree, kv, live)", "original(tree, kv, list(ranges))", PAGE8, True
    ),
    "dead positions count as held": Mutant(
        LIFE, "result - current().ledger.dead_len(kv.req_pool_idx)", "result", PAGE8, True
    ),
    "dead row entries stay": Mutant(
        PLACES, "entries[prefix + packed : tail] = 0", "entries[prefix + packed : tail] *= 1", PAGE8, True
    ),
    "pruned requests enter the tree": Mutant(
        LIFE, "req.skip_radix_cache_insert = True  # nothing", "pass  # nothing", PAGE8, True
    ),
    "keys move, values do not": Mutant(
        COMMON, '("key", "value", "score", "position", "memory")', '("key", "score", "position", "memory")', PAGE8, True
    ),
    "re-prefills after retraction are shared": Mutant(
        LIFE,
        "    if runtime.evicts(req):\n        req.skip_radix_cache_insert = True\n\n\ndef adder_class",
        "\n\ndef adder_class",
        STORM,
        True,
    ),
    "the verb is open to everyone": Mutant(
        "lethe_sglang/engine/verb.py", "AuthLevel.ADMIN_OPTIONAL", "AuthLevel.NORMAL", f"{RECONF} -k authorised", True
    ),
    "the front keeps the old limits": Mutant(
        "lethe_sglang/engine/verb.py",
        "manager.server_args._lethe = replace(request, config=config, budgets=budgets)",
        "pass",
        f"{RECONF} -k limits",
        True,
    ),
    "admission is stock": Mutant(
        LIFE, "return LethePrefillAdder", "return result", "tests/engine/test_pressure.py -k admits", True
    ),
    "ranks rank their own scores": Mutant(
        "lethe_sglang/engine/runtime.py",
        "self.ranks.mean if self.ranks.size > 1 else None",
        "None",
        "tests/engine/test_tensor_parallel.py",
        True,
    ),
    "a changed function of SGLang is not listed": Mutant(
        "lethe_sglang/engine/compat.py",
        "source_hash(target) == recorded",
        "bool(source_hash(target))",
        "tests/engine/test_refusals.py -k another_sglang_changed",
    ),
    "the wheel has no presets": Mutant(
        "pyproject.toml",
        '"configs" = "lethe_sglang/presets"',
        '"configs" = "lethe_sglang/preset"',
        "tests/engine/test_docs.py -k wheels_hold",
        engine=True,
    ),
    "options that JSON changes are accepted": Mutant(
        REGISTRY, "kind(**to_jsonable_python(asdict(made)))", "to_jsonable_python(asdict(made))", POLICIES
    ),
    "recurrence without a memory is accepted": Mutant(
        REGISTRY, 'accumulation.rule == "recurrence"', 'accumulation.rule == "no such"', POLICIES
    ),
    "what a policy's own code raises is a traceback": Mutant(
        SECTION, "_ = policy.accumulation", "_ = policy", f"{POLICIES} -k own_code"
    ),
    "a profile written anew is not taken over": Mutant(
        RULES, "if not changed and budgets != runtime.budgets:", "if False:", LIVE
    ),
    "a list of budgets outlives its allocation": Mutant(
        "lethe_sglang/config/changes.py",
        'budget.get("allocation", "list") != "list"',
        "False",
        "tests/unit/test_changes.py",
    ),
    "what only a GPU can import is taken as it is": Mutant(
        "lethe_sglang/engine/compat.py",
        "source = ast.get_source_segment(text, found[0]) if found else None",
        "source = name if found else None",
        "tests/unit/test_architecture.py -k needs_a_gpu",
    ),
    "nobody sees the pages that fa3 reads": Mutant(
        PAGED, "if self.observers:", "if False:", "tests/unit/test_observed_backends.py -k fa3"
    ),
    "pages forget where the tail begins": Mutant(
        "lethe_sglang/kernels/triton/indices.py",
        "tl.where(first < prefix + kept, first, tail",
        "tl.where(first < prefix + kept, first, first + 0 * tail",
        "tests/kernels/test_triton_indices.py -k pages",
    ),
    "a page table is as long as the sequence": Mutant(
        REFERENCE,
        "used = ceil_div(lengths, page_size)",
        "used = ceil_div(seq_lens, page_size)",
        "tests/kernels/test_triton_indices.py -k pages",
    ),
    "kept cells end inside a page": Mutant(
        LEDGER, "page_ceil(k + state.rest, self.multiple)", "(k + state.rest)", f"{FLASH} -k portable"
    ),
    "a round may leave part of a page": Mutant(
        "lethe_sglang/attention/length_classes.py",
        " or max(kept) % self.ledger.multiple",
        "",
        f"{FLASH} -k part_of_a_page",
    ),
    "fa3 is scheduled by whole sequences": Mutant(
        PAGED,
        "batch, longest, metadata.cache_seqlens_int32,",
        "batch, longest, forward_batch.seq_lens.int(),",
        f"{FLASH} -k portable",
    ),
    "fa3's log-sum-exp is taken for one of base 2": Mutant(
        PAGED, 'cells, lse_base="e")', 'cells, lse_base="2")', f"{FLASH} -k portable"
    ),
    "an fp8 cache is scored by another query than attends": Mutant(
        PAGED, "query.to(self.kv_cache_dtype).to(q.dtype)", "query", f"{FLASH} -k fp8"
    ),
    "a step that is not scored fills lists": Mutant(
        PAGED,
        "if self.scored.scores:\n            super()._begin",
        "if True:\n            super()._begin",
        f"{FLASH} -k alone",
    ),
    "captured lists lie where eager ones did": Mutant(
        PAGED, "self._indices = self._graph_indices\n", "pass\n", f"{FLASH} -k portable"
    ),
    "fa3 takes budgets that differ": Mutant(PAGED, "if len(set(budgets)) > 1:", "if False:", f"{FLASH} -k differ"),
    "fa3 takes attention that is not full": Mutant(PAGED, "or self.has_swa or", "or", f"{FLASH} -k not_full"),
    "the guard lets per-layer budgets have fa3": Mutant(
        "lethe_sglang/engine/guard.py",
        "if not uniform:",
        "if False:",
        "tests/engine/test_refusals.py -k fa3",
        True,
    ),
    "fa3 is tried on any GPU": Mutant(
        "lethe_sglang/engine/guard.py", "[0] in (8, 9)", "[0] > 0", "tests/engine/test_refusals.py -k fa3", True
    ),
    "SGLang's own choice is not asked for": Mutant(
        "lethe_sglang/engine/entrypoints.py",
        "if stock not in guard.legal_backends(view, uniform):",
        "if True:",
        "tests/engine/test_refusals.py -k own_choice",
        True,
    ),
    "a supported row needs no test": Mutant(
        "scripts/docs.py",
        'if state == "yes" and feature not in claims',
        "if False",
        "tests/unit/test_docs.py -k without_a_test",
    ),
    "the marker of a whole file is not read": Mutant(
        "scripts/docs.py", '== "pytestmark"', '== "marks"', "tests/unit/test_docs.py -k without_a_test"
    ),
    "stacked areas begin at nothing": Mutant(
        "scripts/dashboard.py", "value + below.get(at, 0.0)", "value", "tests/unit/test_dashboard.py -k drawn"
    ),
    "torch.compile is let through": Mutant(
        "lethe_sglang/engine/guard.py",
        '"enable_torch_compile": (',
        '"enable_torch_compiles": (',
        "tests/engine/test_refusals.py -k every_refusal",
        True,
    ),
    "the support page is not the guard's": Mutant(
        "lethe_sglang/engine/support.py",
        "scores are averaged over ranks in rounds",
        "scores are summed over ranks in rounds",
        "tests/unit/test_docs.py -k generated",
    ),
    "all that n steps back reach is started anew": Mutant(
        SCORED, "(at >= self._started[rows].unsqueeze(1)) & (at >= 0)", "at >= 0", f"{PHASE} -k decay"
    ),
    "only the newest token is started": Mutant(
        SCORED, "torch.arange(self.ledger.phase.every, device", "torch.arange(1, device", f"{PHASE} -k decay"
    ),
    "a scored step decays by one step": Mutant(
        SCORED, "decay=rule.step_decay, every=1", "every=1", f"{PHASE} -k decay"
    ),
    "a step that is not scored prepares a score": Mutant(
        SCORED, "if not self.scores:\n                return", "if False:\n                return", f"{PHASE} -k alone"
    ),
    "what a step has started is forgotten": Mutant(
        SCORED, "] = seq_lens.to(torch.int64)", "] *= 1", f"{PHASE} -k decay"
    ),
    "any live change starts a phase": Mutant(
        "lethe_sglang/cache/phase.py",
        "if (every, by_length) != (self.every, self.by_length):",
        "if True:",
        f"{PHASE} -k live_change",
    ),
    "lines are uploaded in columns": Mutant(
        "lethe_sglang/cache/upload.py",
        "np.ascontiguousarray(lines, dtype=np.int32)",
        "lines.astype(np.int32)",
        "tests/unit/test_uploads.py -k line_by_line",
    ),
    "a prompt may have no query that is scored": Mutant(
        "lethe_sglang/attention/prefill.py",
        "range((w - 1) % rule.every",
        "range(0",
        "tests/unit/test_score.py -k replayed",
    ),
    "a new batch takes over a phase": Mutant(
        "lethe_sglang/cache/phase.py", "0 if new or self.scores", "0 if self.scores", f"{PHASE} -k since_it_was_new"
    ),
    "a deterministic step is scored if all requests are": Mutant(
        "lethe_sglang/cache/phase.py", "= any(length", "= all(length", f"{PHASE} -k phase_is_that"
    ),
    "a variant has a plan of its own": Mutant(
        "lethe_sglang/attention/flashinfer.py",
        "if bs in self.decode_cuda_graph_metadata:",
        "if False:",
        f"{PHASE} -k batch_size",
    ),
    "tokens may leave the window unscored": Mutant(
        "lethe_sglang/config/schema.py", "rule.in_phase <= self.recent", "rule.in_phase", f"{PHASE} -k unscored"
    ),
    "first rounds come together": Mutant(
        LEDGER, "leaving += state.stagger %", "leaving += 0 * state.stagger %", f"{UNIT} -k staggered"
    ),
    "first rounds come too late": Mutant(
        LEDGER, "room + self.interval - leaving + 1, 1)", "3 * self.interval, 1)", f"{UNIT} -k staggered"
    ),
    "a first round depends on the row": Mutant(
        "lethe_sglang/engine/runtime.py",
        "stagger_of(req.origin_input_ids)",
        "stagger_of([kv.req_pool_idx])",
        f"{UNIT} -k prompt_alone",
    ),
    "k3 is of the other direction": Mutant(
        TRAJECTORY, "np.expm1(r) - r", "np.expm1(-r) + r", f"{PATHS} -k sampled_tokens"
    ),
    "a prefill is read from its beginning": Mutant(
        TRAJECTORY,
        "steps, first = steps[max(len(steps) - count, 0) :], first[max(len(first) - count, 0) :]",
        "steps, first = steps[:count], first[:count]",
        f"{PATHS} -k from_its_end",
    ),
    "the prefix cache answers for a reply": Mutant(
        TRAJECTORY, '"logprob_start_len": len(prompt) - 1', '"logprob_start_len": -1', f"{PATHS} -k prefilled_once"
    ),
    "own replies are sampled at another temperature": Mutant(
        TRAJECTORY, '{"temperature": 1, ', '{"temperature": 0.8, ', f"{PATHS} -k temperature_1"
    ),
    "the first steps of own replies count": Mutant(
        TRAJECTORY, "np.load(path)[skip:]", "np.load(path)", f"{PATHS} -k before_any_round"
    ),
    "the full cache's own replies are evicted from": Mutant(
        "lethe_bench/fidelity/run.py", 'evicts=arm != "full"', "evicts=True", f"{PATHS} -k temperature_1"
    ),
    "trajectories make another experiment": Mutant(
        "lethe_bench/fidelity/run.py", '"at_once", "trajectories"}', '"at_once"}', f"{PATHS} -k added"
    ),
    "own replies are measured with the arm before": Mutant(
        "lethe_bench/fidelity/run.py",
        "        if missing:\n            self._switch(server, arm)",
        "",
        f"{PATHS} -k added",
    ),
    "the quickstart keeps everything": Mutant(
        "scripts/quickstart.py",
        "str(tokens // 4)",
        "str(tokens)",
        "tests/engine/test_quickstart.py -k english",
        engine=True,
    ),
    "Lethe keeps what nothing reads": Mutant(
        "lethe_sglang/policies/lethe.py",
        'score = candidates.need("score")',
        'score = -candidates.need("score")',
        "tests/engine/test_fidelity.py",
        engine=True,
    ),
    "equal prompts of two types have two first rounds": Mutant(
        "lethe_sglang/cache/arrivals.py",
        "np.asarray(prompt[-STAGGER_BY:], dtype=np.int64).tobytes()",
        "repr(prompt[-STAGGER_BY:]).encode()",
        f"{UNIT} -k prompt_alone",
    ),
    "steps at once do not decay what was": Mutant(
        REPLAY, "old = rule.step_decay ** int(scored.sum())", "old = 1.0", f"{REPLAYED} -k one_by_one"
    ),
    "steps at once see what comes later": Mutant(REPLAY, ".triu(1)", ".triu(2)", f"{REPLAYED} -k full_cache_is_what"),
    "a replay forgets what a round evicted": Mutant(
        REPLAY, "seq, lines.spans, self", "seq, lines.spans._replace(kept=0 * lines.kept), self", REPLAYED
    ),
    "side by side, an arm sees the queries of another": Mutant(
        "lethe_bench/fidelity/network.py",
        "own = slice(end, end := end + len(part.tokens))",
        "own = slice(0, end := len(part.tokens))",
        f"{REPLAYED} -k side_by_side",
    ),
    "side by side, steps are another arm's": Mutant(
        REPLAY, "yield which, part.start, logits", "yield 0, part.start, logits", f"{REPLAYED} -k side_by_side"
    ),
    "steps before the first round are computed again": Mutant(
        REPLAY, "first=0 if self.rounds else end - start", "first=0", f"{REPLAYED} -k not_computed_before"
    ),
    "breakpoint counts places for attention": Mutant(
        ROUNDS,
        "salience = candidates.score if gathers",
        "salience = candidates.score if not gathers",
        "tests/unit/test_breakpoint.py -k however",
    ),
    "an arm that cannot be replayed is found when its turn comes": Mutant(
        "lethe_bench/fidelity/inprocess.py",
        "            budgets(config, layers)\n",
        "            pass\n",
        f"{REPLAYED} -k before_anything",
    ),
    "attention with a window is replayed without": Mutant(
        "lethe_bench/fidelity/network.py",
        "if used := [name",
        "if used := [] and [name",
        f"{REPLAYED} -k not_computed_here",
    ),
    "steps are counted from the first round": Mutant(
        "lethe_bench/fidelity/plots.py", "kl[start:end]", "kl[starts[0]:end]", f"{REPLAYED} -k curves_average"
    ),
    "a sum is a mean": Mutant(
        "lethe_bench/statistics.py",
        "total += float(sum(values.sum() for values in groups)) / count",
        "total += float(sum(values.sum() for values in groups)) / count / len(parts)",
        "tests/bench/test_fidelity.py -k means_of_both",
    ),
    "keys have the share of scores": Mutant(
        PLACES,
        "by_key.add_(features.BEHIND).div_(share)",
        "by_key.add_(features.BEHIND).div_(1 - share)",
        f"{REF} -k few",
    ),
    "recall has no part in what a layer costs": Mutant(
        "lethe_sglang/allocation/rules.py",
        "(profile.fidelity.kl, profile.fidelity.recall))",
        "(profile.fidelity.kl, profile.fidelity.kl))",
        f"{ARTIFACT} -k both_measures",
    ),
    "a pruned layer has a window of its own": Mutant(
        "lethe_bench/fidelity/layers.py",
        '"recent_ratio": (config.recent - 0.5) / mean}',
        '"recent_ratio": 0.3}',
        f"{REPLAYED} -k layer_costs",
    ),
    "questions share names": Mutant(
        "lethe_bench/fidelity/corpora.py",
        'f"own-{form} {subject}"',
        'f"own-{subject}"',
        "tests/bench/test_fidelity.py -k names",
    ),
    "short requests come with the long ones": Mutant(
        LOAD, "while not long.reached.wait(0.1):", "while False:", f"{LOADED} -k come_at_their_moment"
    ),
    "a request waits until anybody's first token": Mutant(
        LOAD, "[self._first[number] - self.began", "[min(self._first.values()) - self.began", f"{LOADED} -k its_own"
    ),
    "samples of another run are mixed in": Mutant(LOAD, "not in ([], [header])", "is None", f"{LOADED} -k goes_on"),
    "what is done is done again": Mutant(LOAD, "not in known]", "not in ()]", f"{LOADED} -k goes_on"),
    "a growing process passes a soak": Mutant(
        JUDGED, "is not None and slope > (limit", "is ... and slope > (limit", f"{SOAKED} -k planted"
    ),
    "a soak's growth is not judged beyond stock's": Mutant(
        JUDGED, "bound + max(0.0, stock or 0.0)", "bound", f"{SOAKED} -k beyond"
    ),
    "a call of a tool passes a soak unread": Mutant(
        "lethe_bench/soak/client.py", '_check_call(reply["choices"][0])', "pass", f"{SOAKED} -k checked_against"
    ),
    "a stock server is asked for rounds": Mutant(
        SOAK, "if name in SWITCHES and not self.evicts:", "if False:", f"{SOAKED} -k stock_server_gets"
    ),
    "growth is that of the whole soak": Mutant(JUDGED, ") / 2 if samples else", ") / 200 if samples else", SOAKED),
    "a difference passes a soak": Mutant(
        JUDGED, "for name in found.different]", "for name in ()]", f"{SOAKED} -k planted"
    ),
    "a soak without a round passes": Mutant(JUDGED, "if not count]", "if False]", f"{SOAKED} -k planted"),
    "a soak forgets to compare": Mutant(
        SOAK, "if not self.recorded.same(", "if not self.recorded.replies.get(", f"{SOAKED} -k another_reply"
    ),
    "a soak leaves the server paused": Mutant(
        SOAK,
        "        finally:\n            self.server.post(",
        "        except ArithmeticError:\n            self.server.post(",
        f"{SOAKED} -k pause_ends",
    ),
    "a soak takes a refused flush for one": Mutant(
        SOAK, "and not self._flush()", "and not (self._flush() or 1)", SOAKED
    ),
    "a soak weighs pages of files": Mutant(
        "lethe_bench/soak/ends.py", "^Rss(?:Anon|Shmem)", "^Rss(?:Anon|Shmem|File)", f"{SOAKED} -k beside_pages"
    ),
    "a soak reads its log once": Mutant(SOAK, "log.seek(self._read)", "log.seek(0)", f"{SOAKED} -k read_once"),
    "Ctrl-C leaves a soak's server": Mutant(SOAK, "self.server.stop(grace=0)", "...", f"{SOAKED} -k ctrl_c"),
    "an end under load overlooks an orphan": Mutant(
        "lethe_bench/soak/ends.py", "    if left:", "    if server.status is None:", f"{SOAKED} -k stays"
    ),
    "replies unlike stock's are not counted": Mutant(
        "lethe_bench/load/report.py", "sum(one != other for", "sum(one is other for", f"{LOADED} -k no_longer"
    ),
    "both modes are always": Mutant(
        "lethe_bench/throughput/plan.py",
        'data["rounds"]["when"] = when',
        'data["rounds"]["when"] = "always"',
        f"{LOADED} -k in_when_alone",
    ),
    "a server under pressure has to run rounds": Mutant(
        "lethe_bench/throughput/measure.py",
        'not found["rounds"] and pressure is None',
        'not found["rounds"]',
        f"{LOADED} -k retractions_of_stock",
    ),
    "a group is forced in part": Mutant(
        FORCED, "self._each(force, group,", "self._each(force, self.missing(folder, group),", f"{AT_ONCE} -k as_a_whole"
    ),
    "documents of the full cache wait for each other": Mutant(
        FORCED, 'self.whole(prompts) if arm == "full" else', "", f"{AT_ONCE} -k as_a_whole"
    ),
    "a retracted request skips a step": Mutant(
        "lethe_bench/fidelity/processor.py",
        'forced["step"] = len(request.output_ids)',
        'forced["step"] += 1',
        f"{AT_ONCE} -k does_not_have",
    ),
    "a retracted request keeps a step twice": Mutant(
        "lethe_bench/fidelity/processor.py",
        'del forced.get("found", [])[forced["step"] :]',
        "pass",
        f"{AT_ONCE} -k does_not_have",
    ),
    "a last group is smaller": Mutant(
        "lethe_bench/fidelity/loads.py",
        "[(start + n) % len(documents)] for n in range(load)]",
        "[start + n] for n in range(min(load, len(documents) - start))]",
        f"{AT_ONCE} -k fill_up",
    ),
    "a load has the numbers of another": Mutant(
        "lethe_bench/fidelity/loads.py",
        "results.arms.get(folder_of(arm, load), {})",
        "results.arms.get(folder_of(arm, 1), {})",
        f"{AT_ONCE} -k as_a_whole",
    ),
    "an event makes room for one step only": Mutant(
        PRESSURE, "needed = lacking + steppers * runtime.ledger.interval", "needed = lacking", MACHINE
    ),
    "a share may be below a request's floor": Mutant(
        PRESSURE,
        "        if share > floor:",
        "        if share >= runtime.config.floor:",
        "tests/unit/test_state_machine.py -k asked_for_more",
    ),
    "an event reckons with the budgets before a change": Mutant(
        PRESSURE, "self.runtime.renew(req, state)", "pass", "tests/unit/test_state_machine.py -k just_after"
    ),
    "a request that finishes gives": Mutant(
        PRESSURE,
        "and not req.finished() and id(req) not in finishing:",
        "and not req.finished():",
        "tests/unit/test_state_machine.py -k in_flight",
    ),
    "an event while memory comes back": Mutant(
        PRESSURE, "if lacking > 0 and not finishing:", "if lacking > 0:", "tests/unit/test_pressure.py -k memory_back"
    ),
    "what requests hold above their bounds is not lent": Mutant(
        PRESSURE, "return self.surplus(givers), self.at_floors(givers)", "return 0, self.at_floors(givers)", MACHINE
    ),
    "what rounds would free at once is not lent": Mutant(
        "lethe_sglang/engine/admission.py",
        "self.memory_budget.current_offset += self._lent[1] - at_once",
        "pass",
        "tests/unit/test_pressure.py -k at_once",
    ),
    "cached prefixes go last": Mutant(
        PRESSURE,
        "available_size() + batch.tree_cache.evictable_size())",
        "available_size())",
        MACHINE,
    ),
    "a row with holes enters the tree": Mutant(PRESSURE, "req.skip_radix_cache_insert = True", "pass", MACHINE),
    "no round makes room for a prefill": Mutant(
        PRESSURE, "        if lacking > 0:\n            steppers", "        if False:\n            steppers", MACHINE
    ),
    "a request that holds a surplus is charged for it": Mutant(
        ADMISSION, "total_offset += self._lent[0] - surplus", "total_offset += surplus - self._lent[0]", MACHINE
    ),
    "a request gives below its floor": Mutant(
        SHARES, "keep = -(-(np.maximum(floor, share) + rest)", "keep = -(-(share + 0 * floor + rest)", SHARED
    ),
    "the rest of a prompt is not on top of a share": Mutant(
        SHARES, "share) + rest) // page_size", "share)) // page_size", SHARED
    ),
    "a request below the share takes": Mutant(SHARES, "np.maximum(most - keep, 0)", "most - keep", SHARED),
    "a share gives more than is needed": Mutant(SHARES, ".sum() >= needed:", ".sum() > needed:", SHARED),
    "a request that holds no more than the share gives": Mutant(
        PRESSURE,
        "return plan if above and freed(plan) > 0",
        "return plan if freed(plan) > 0",
        "tests/unit/test_pressure.py",
    ),
    "admission does not look again when somebody new can give": Mutant(
        LIFE, "if len(ledger.requests) > known:", "if False:", "tests/unit/test_pressure.py -k looks_again"
    ),
    "a floor that the pool cannot hold is taken": Mutant(
        "lethe_sglang/engine/guard.py",
        "if config.rounds.by_pressure and least > tokens:",
        "if False:",
        "tests/engine/test_refusals.py -k floor",
    ),
    "a controller passes on one replica's word": Mutant(
        "lethe_sglang/engine/proof.py",
        "in controller._scheduler_init_infos]",
        "in controller._scheduler_init_infos[:1]]",
        "tests/engine/test_refusals.py -k each_replica",
    ),
    "one proven replica is enough": Mutant(
        "lethe_sglang/engine/proof.py",
        "if len(ranks) < replicas or any(",
        "if any(",
        "tests/engine/test_refusals.py -k each_replica",
    ),
    "a request comes between two replicas' changes": Mutant(
        "lethe_sglang/engine/verb.py",
        "async with manager.is_pause_cond:",
        "async with asyncio.Lock():",
        "tests/unit/test_verb.py -k stays_so",
    ),
    "a request on its way is not looked for": Mutant(
        "lethe_sglang/engine/verb.py",
        "if idle_options(changed) and await",
        "if False and await",
        "tests/unit/test_verb.py -k no_replica",
    ),
    "what one replica refuses another takes": Mutant(
        "lethe_sglang/engine/verb.py",
        'changed = (await ask(manager, "check", **asked))',
        'changed = (await ask(manager, "reconfigure", **asked, agreed=False))',
        "tests/unit/test_verb.py -k one_refuses",
    ),
    "layers are counted once a replica": Mutant(
        TOP, 'page.each(f"{EVICT}layers"', 'page.by(f"{EVICT}layers"', f"{FRAME} -k replicas"
    ),
    "the launcher does not look at the pool": Mutant(
        "lethe_sglang/engine/proof.py",
        "for rank in () if request.measures else ranks:",
        "for rank in ():",
        "tests/engine/test_refusals.py -k floor",
    ),
    "k3 of a live server is of the other direction": Mutant(
        QUALITY, "math.expm1(r) - r", "math.expm1(-r) + r", f"{WATCHED} -k mean_of_k3"
    ),
    "whether and where are one draw": Mutant(QUALITY, "digest[4:]", "digest[:4]", f"{WATCHED} -k independently"),
    "a token is compared with the next position": Mutant(
        MONITOR, "start=prompt + first - 1", "start=prompt + first", f"{WATCHED} -k own_position"
    ),
    "a token that nobody got is recorded": Mutant(
        QUALITY, "if commit is not None:", "if commit or noted.req._kv_quality.told.setdefault(99, 0) is None:", WATCHED
    ),
    "a step's own token counts as a step since the round": Mutant(
        MONITOR, "kv_committed_len) - 1 - state", "kv_committed_len) - state", f"{WATCHED} -k steps_are_counted"
    ),
    "a probe does not heed who waits": Mutant(
        MONITOR, "if scheduler.waiting_queue or", "if", f"{WATCHED} -k goes_first"
    ),
    "a probe forgets the next steps of those who run": Mutant(
        MONITOR, "+ page + 2 * page * requests", "+ page", f"{WATCHED} -k takes_no_memory"
    ),
    "a refused probe closes admission": Mutant(
        MONITOR, "plan.running_batch.batch_is_full = False", "pass", f"{WATCHED} -k leaves_no_trace"
    ),
    "a probe enters the tree": Mutant(
        MONITOR, "req.skip_radix_cache_insert = True", "pass", f"{WATCHED} -k own_position"
    ),
    "a probe is streamed": Mutant(MONITOR, "req.finished_output = True", "pass", f"{WATCHED} -k own_position"),
    "a probe is evicted from": Mutant(MONITOR, 'mode="none"', 'mode="on"', f"{WATCHED} -k own_position"),
    "old log-probabilities outlive the weights": Mutant(
        MONITOR, "self.epoch += 1", "self.epoch += 0", f"{WATCHED} -k weights_changed"
    ),
    "a probe in flight keeps the server busy": Mutant(
        MONITOR, "            scheduler.last_batch = None", "            pass", f"{WATCHED} -k in_flight"
    ),
    "probes cost a minute nothing": Mutant(
        MONITOR, "self._allowance.spend(time.monotonic(), extend)", "pass", f"{WATCHED} -k than_a_minute"
    ),
    "requests with penalties are sampled": Mutant(
        MONITOR, "return not penalties and", "return", f"{WATCHED} -k says_little"
    ),
    "a share of a load forgets the interval": Mutant(
        "lethe_bench/deployment.py",
        "interval = self.overhead - 2 * self.page_size",
        "interval = 0",
        "tests/bench/test_plan.py -k pressure",
    ),
    "what a door has heard is not laid in": Mutant(
        "lethe_sglang/engine/doors.py",
        'return {**params, "custom_params": {**custom, "kv_evict": asked}}',
        "return params",
        "tests/unit/test_doors.py -k sampling_parameter",
    ),
    "header and body may differ": Mutant(
        "lethe_sglang/engine/doors.py",
        "if len(set(read.values())) > 1:",
        "if False:",
        "tests/unit/test_doors.py -k twice",
    ),
    "the header that passes routers is not read": Mutant(
        "lethe_sglang/engine/doors.py",
        'HEADERS = ("X-KV-Evict", "X-Request-Id-KV-Evict")',
        'HEADERS = ("X-KV-Evict", "X-Lethe-KV-Evict")',
        "tests/unit/test_doors.py -k header",
    ),
    "Ollama's options are not looked at": Mutant(
        "lethe_sglang/engine/doors.py",
        '("parameters", "sampling_params"), ("options",))',
        '("parameters", "sampling_params"))',
        "tests/unit/test_doors.py -k wherever",
    ),
    "an override beside custom_params is dropped": Mutant(
        "lethe_sglang/engine/doors.py",
        'if "kv_evict" in found:',
        "if False:",
        "tests/unit/test_doors.py -k legal",
    ),
    "what a batch says against a header is dropped": Mutant(
        "lethe_sglang/engine/doors.py",
        "if own is not None and _read(manager, own) != _read(manager, asked):",
        "if False:",
        "tests/unit/test_doors.py -k batch",
    ),
    "a message repeats whatever key it was sent": Mutant(
        "lethe_sglang/config/overrides.py",
        "(str(key)[:SHOWN_VALUE] for",
        "(str(key) for",
        "tests/unit/test_doors.py -k depth",
    ),
    "a message names every unknown key": Mutant(
        "lethe_sglang/config/overrides.py",
        "islice(unknown, _NAMED)",
        "unknown",
        "tests/unit/test_doors.py -k depth",
    ),
    "a message holds what UTF-8 cannot carry": Mutant(
        "lethe_sglang/errors.py",
        'ConfigError(text.encode("utf-8", "backslashreplace").decode())',
        "ConfigError(text)",
        "tests/unit/test_doors.py -k short_line",
    ),
    "a full disk takes part of a record": Mutant(
        "lethe_sglang/files.py",
        "while data:",
        "if data:",
        "tests/unit/test_files.py -k room",
    ),
    "a record that did not fit leaves a part": Mutant(
        "lethe_sglang/files.py",
        "file.truncate(end)\n                raise",
        "raise",
        "tests/unit/test_files.py -k room",
    ),
    "a cache is tried with an empty file": Mutant(
        "lethe_sglang/profiling/cache.py",
        "probe.write(bytes(PROBE_BYTES))",
        'probe.write(b"")',
        "tests/unit/test_profile_cache.py -k full_disk",
    ),
    "a pass that a full disk stopped leaves its records": Mutant(
        "lethe_sglang/profiling/cache.py",
        'Partial(path, key="").remove()',
        "pass",
        "tests/unit/test_profile_cache.py -k meanwhile",
    ),
    "a full disk is a traceback": Mutant(
        "lethe_sglang/cli/main.py",
        "if error.errno not in _NO_ROOM:",
        "if True:",
        "tests/unit/test_program.py -k full_disk",
    ),
    "a live server takes a floor beyond its pool": Mutant(
        "lethe_sglang/engine/reconfigure.py",
        "*_pool(runtime, config), ",
        "",
        "tests/unit/test_reconfigure.py -k cannot_hold",
    ),
    "the reach forgets the interval": Mutant(
        "lethe_sglang/cache/layout.py",
        "leaving = max(page_ceil(interval, page_size), min(budgets) + rest + 1)",
        "leaving = min(budgets) + rest + 1",
        "tests/unit/test_reconfigure.py -k reach_says",
    ),
    "every rank warns of the reach": Mutant(
        "lethe_sglang/engine/reach.py",
        " or runtime.ranks.rank:",
        ":",
        "tests/unit/test_reconfigure.py -k says_so_once",
    ),
    "a copy of server arguments forgets eviction": Mutant(
        "lethe_sglang/engine/keywords.py",
        "copy._lethe = request",
        "pass",
        "tests/engine/test_refusals.py -k copy",
        True,
    ),
    "SMG's launcher is let through": Mutant(
        "lethe_sglang/engine/guard.py",
        '"smg_grpc_mode": (',
        '"smg_grpc_modes": (',
        "tests/engine/test_refusals.py -k refused_with",
        True,
    ),
    "a counter is told totals as if they were new": Mutant(METRICS, "inc(total - before)", "inc(total)", SCRAPED),
    "cells are counted again at each launch": Mutant(
        METRICS, "evicted[layer] - self._cells[layer] for", "evicted[layer] for", SCRAPED
    ),
    "a total is a gauge": Mutant(METRICS, "[made(Counter, name, text)", "[gauge(name, text)", SCRAPED),
    "a metric is renamed and its dashboard is not": Mutant(METRICS, '"saved_blocks"', '"spared_blocks"', SCRAPED),
    "every rank publishes": Mutant(METRICS, "if context.current_scheduler_metrics_enabled:", "if True:", SCRAPED),
    "totals wait until SGLang publishes": Mutant(
        "lethe_sglang/engine/counters.py", "self.publish(seconds)", "pass", SCRAPED
    ),
    "dead positions are held": Mutant(
        LEDGER, "return self.allocated - self.layout.dead_len", "return self.allocated", f"{SCRAPED} {REPLIED}"
    ),
    "a request that goes on is accounted for": Mutant(REPLIES, " if req.finished() else None", "", REPLIED),
    "an account becomes a list of tokens": Mutant(REPLIES, " if key != KEY}", "}", REPLIED),
    "choices are told in the order in which they end": Mutant(
        REPLIES, "sorted(completion_tokens.items())", "completion_tokens.items()", REPLIED
    ),
    "a retracted request holds what it held before": Mutant(LIFE, "lives(req).append(None)", "pass", REPLIED),
    "a request's lives are not kept": Mutant(
        "lethe_sglang/engine/runtime.py",
        "lives(req).append(state)",
        "pass",
        "tests/engine/test_front_doors.py -k native_reply",
        engine=True,
    ),
    "usage drops what it does not declare": Mutant(REPLIES, '["extra"] = "allow"', '["extra"] = "ignore"', REPLIED),
    "the ranks' numbers are added up": Mutant(TOP, 'if sample.labels.get("tp_rank", "0") == "0":', "if True:", FRAME),
    "any address is read": Mutant(TOP, 'if not url.startswith(("http://", "https://")):', "if False:", FRAME),
    "a kit that pauses runs beside others": Mutant(
        "lethe_bench/kits/run.py", "if not KITS[name].alone", "if True", "tests/unit/test_kits.py -k alone"
    ),
    "kits of another model are mixed": Mutant(
        "scripts/kits.py",
        'if before.get("model") == kit["model"]',
        "if True",
        "tests/unit/test_kits.py -k leaves_the_others",
    ),
    "a kit that fails with eviction alone is let through": Mutant(
        "lethe_bench/kits/page.py",
        'return ("passes only with eviction", stock["error"]) if stock["error"] else',
        'return ("equal", "") if True else',
        "tests/unit/test_kits.py -k by_design",
    ),
}


def outcome(mutant: Mutant) -> tuple[bool, str]:
    """Run a mutant's tests on a mutated copy of the tree: whether they pass, which is bad, and pytest's last line."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache"))
        path = copy / mutant.file
        source = path.read_text()
        if source.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.file}: {mutant.old!r} occurs {source.count(mutant.old)} times")
        path.write_text(source.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest could not run {mutant.tests}: {done.stdout[-500:]}{done.stderr[-500:]}")
        return done.returncode == 0, done.stdout.strip().splitlines()[-1]


def main() -> int:
    """Run the chosen mutants; the exit status is the number of survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="run those that need servers as well")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run N at a time (default: 1)")
    parser.add_argument("names", nargs="*", help="only these")
    args = parser.parse_args()
    chosen = {
        name: mutant
        for name, mutant in MUTANTS.items()
        if (name in args.names if args.names else args.engine or not mutant.engine)
    }
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, (survived, line) in zip(chosen, pool.map(outcome, chosen.values()), strict=True):
            survivors += survived
            print(f"{name}\n    {'SURVIVED: ' if survived else ''}{line}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} went red")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
