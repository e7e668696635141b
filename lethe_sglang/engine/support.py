"""What works with eviction and what does not: a table of what is supported, and the guard's of what is refused."""

from __future__ import annotations

from collections.abc import Mapping

from lethe_sglang.engine.guard import ENVIRONMENT, MODELS, REFUSALS, REQUESTS

SUPPORTED = (
    ("radix prefix cache", "yes", "prompts are shared as always; outputs of evicted requests are not inserted"),
    ("overlap scheduler", "yes", "and without it"),
    ("chunked prefill", "yes", ""),
    ("continuous batching, retraction, abort, pause", "yes", ""),
    ("page sizes", "yes", "1, 8 and 16 are tested"),
    (
        "tensor parallelism",
        "yes",
        "scores are averaged over ranks in rounds; tested with 2 ranks on a CPU, not run on GPUs",
    ),
    (
        "data parallelism (--dp-size)",
        "yes",
        "each replica has its own pool and proves at the start that it evicts; tested on a CPU with 2 "
        "(under LETHE_SLOW=1 with 2 of --tp 2 each), not run on GPUs",
    ),
    (
        "several servers behind SGLang's router",
        "yes",
        "overrides of one request by header: sglang-router forwards no others (examples/router.py)",
    ),
    ("attention backend torch_native", "yes", "on a CPU or an NVIDIA GPU, without CUDA graphs"),
    ("attention backends flashinfer and triton, CUDA graphs", "CUDA only", "ran on an H100"),
    (
        "attention backend fa3, CUDA graphs",
        "CUDA only",
        "uniform budgets only: it reads one page table for all layers, and each keeps whole pages; ran on an H100",
    ),
    (
        "no attention backend named",
        "CUDA only",
        "SGLang's own choice if it is one of these and can serve, else flashinfer, with "
        "--enable-deterministic-inference triton",
    ),
    ("any other attention backend", "refused", "name one of these"),
    ("different backends for prefill and decode", "refused", "set --attention-backend alone"),
    (
        "fp8 KV cache",
        "CUDA only",
        "fp8_e4m3 (ran on an H100, on flashinfer) and, not on fa3, fp8_e5m2, scored with the layer's scale",
    ),
    ("multi-head and grouped-query attention", "yes", "MoE feed-forward layers are not looked at, and not tested"),
    ("chat, completions, streaming, logprobs, frontend programs", "yes", ""),
    (
        "LoRA",
        "yes",
        "adapters beside the base model in a batch; tested on a CPU with SGLang's torch_native LoRA backend",
    ),
    ("constrained decoding", "yes", "regular expressions, JSON schemas, EBNF (xgrammar), also after reasoning"),
    ("reasoning parsers", "yes", "with --enable-strict-thinking and a thinking budget, too"),
    ("tool parsers", "yes", "after reasoning, too"),
    ("custom logit processors", "yes", "custom_params may have their parameters beside kv_evict"),
    ("priority scheduling", "yes", "a request that is preempted is treated as one that is retracted"),
    ("schedule policies", "yes", "fcfs, lpm, lof, dfs-weight, hrrn, shortest-prefill-first, random, routing-key"),
    ("sessions", "yes", "--enable-streaming-session apart, which is refused"),
    (
        "weight updates",
        "yes",
        "from disk; running requests are retracted (mode retract of a pause) and go on with the new weights",
    ),
    (
        "memory release and resume",
        "expected",
        "the verbs are tested, but a CPU releases no memory, and a GPU has not been tried",
    ),
    ("gRPC beside HTTP (--grpc-port)", "yes", "how a request asks for a budget of its own: the page on limits"),
    ("sgl.Engine and SGLang's offline_throughput", "yes", "the latter by python -m lethe_sglang.plugin"),
    ("HttpServerEngineAdapter", "yes", "after load_plugins()"),
)
"""Rows of what the guard's tables do not refuse: feature, state, note. Tests name the row that they prove."""


def support_matrix(proofs: Mapping[str, str] | None = None) -> str:
    """Render what is supported and what is refused as a Markdown table.

    Parameters
    ----------
    proofs
        What proves a feature, by its name: one more column. The program has none, for it knows no tests.
    """
    rows = [
        *SUPPORTED,
        *((r.feature, "refused", f"{r.why}; {r.instead}") for r in REFUSALS),
        *((r.feature, "refused (HTTP 400)", f"{r.why}; {r.instead}") for r in REQUESTS),
        *((name, "refused", "model") for name, _ in MODELS),
        *((f"environment variable {name}", "refused", why) for name, why in ENVIRONMENT),
    ]
    head: list[tuple[str, ...]] = [("feature", "with --kv-evict", "note"), ("---",) * 3]
    lines = [*head, *rows]
    if proofs is not None:
        lines = [(*head[0], "proven by"), ("---",) * 4, *((*row, proofs.get(row[0], "")) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
