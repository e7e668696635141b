#!/usr/bin/env python3
"""Compare with kvpress, NVIDIA's reference implementations of KV eviction on Hugging Face transformers.

bash scripts/kvpress.sh                          set up an environment for kvpress and run this in it
bash scripts/kvpress.sh --results DIR            with the accuracies that lethe eval run left in DIR beside kvpress's
bash scripts/kvpress.sh --model models/reasoner-dev --problems 4

**Scores.** Where a kvpress method and a policy of ours are defined alike, both rank the same keys and queries of one
reply of the model, layer by layer: KeyDiff (per KV head), TOVA, SnapKV (mean over KV heads), StreamingLLM; and
ObservedAttention against H2O, which differ by a divisor.

**Accuracy.** The same problems, greedy, with kvpress's ``DecodingPress`` (compression every ``--interval`` decode steps
to prompt + budget tokens), against what our server got at that budget. The two are not the same algorithm:

* kvpress keeps tokens per layer and KV head (TOVA and StreamingLLM apart), we per layer. Equal memory all the same.
* kvpress ranks the prompt and the recent tokens like all others and may evict them. Rows with ``+prompt`` protect what
  our server protects: the prompt and the recent window. It is our wrapper (``Guarded``), not part of kvpress.
* kvpress leaves the cache in the order of the scores. A method that goes by the place in the cache (StreamingLLM)
  evicts arbitrary tokens from the second compression on; ``Guarded`` keeps the order.
* ``DecodingPress`` gives SnapKV the position embedding of the current token for all queries of its window; ``Guarded``
  gives each its own. SnapKV never evicts its window, which is as long as our recent window here.
* Only the scores at a compression exist, nothing accumulates from step to step: no Lethe, no H2O (``ObservedAttention``
  would see one step), no G-KV, no LazyEviction. KnormPress is kvpress's alone.
* ``RandomPress`` draws anew at every compression and per KV head; our random keeps one fixed sample per layer.
  ``KeyDiffPress`` takes the mean key over the prompt too, ours over the tokens that may be evicted.

Writes ``--json``, a list of {policy, budget, family, index, ok, tokens, peak, run} that is resumed if it exists, and
``--page``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import kvpress
import torch
import yaml
from kvpress.utils import compute_n_kept, get_prerope_query_states
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lethe_sglang.config import EvictionConfig, from_mapping  # noqa: E402
from lethe_sglang.evaluation.datasets import Item, family_items  # noqa: E402
from lethe_sglang.evaluation.statistics import wilson  # noqa: E402
from lethe_sglang.evaluation.tasks import THINK, TRAINED  # noqa: E402
from lethe_sglang.kernels.repack import select  # noqa: E402
from lethe_sglang.kernels.score import observation_attention, replay  # noqa: E402
from lethe_sglang.policies import POLICIES, Accumulation, Candidates, Policy  # noqa: E402

SINKS = EvictionConfig().retain.sinks
METHODS = ("streaming", "random", "tova", "snapkv", "keydiff", "knorm")
Record = dict[str, Any]


# -- the model -----------------------------------------------------------------------------------------------------


class Model:
    """A causal language model on Hugging Face transformers, in float32 on the CPU."""

    def __init__(self, path: str) -> None:
        self.network: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        weights = b"".join(p.detach().numpy().tobytes() for p in self.network.parameters())
        self.digest = hashlib.sha256(weights).hexdigest()

    def encode(self, question: str) -> torch.Tensor:
        """Token ids ``[1, n]`` of a question in the chat template."""
        message = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])

    def generate(self, prompt: torch.Tensor, limit: int, press: Any | None) -> tuple[str, int, int]:
        """Decode greedily under ``press``; returns the text, its tokens and the most tokens in the cache."""
        cache, written, peak = DynamicCache(), [], 0
        logits = self.network(input_ids=prompt, past_key_values=cache).logits
        with press(self.network) if press is not None else contextlib.nullcontext():
            while len(written) < limit:
                token = int(logits[0, -1].argmax())
                if token == self.tokenizer.eos_token_id:
                    break
                written.append(token)
                peak = max(peak, cache.get_seq_length() + 1)
                place = torch.tensor([[prompt.shape[1] + len(written) - 1]])
                logits = self.network(
                    input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=place
                ).logits
        return self.tokenizer.decode(written), len(written), peak


# -- kvpress while decoding ------------------------------------------------------------------------------------------


@dataclass
class Guarded(kvpress.presses.scorer_press.ScorerPress):
    """A kvpress method that spares the first ``head`` and last ``tail`` tokens and keeps the cache in its order."""

    press: Any = None
    head: int = 0
    tail: int = 0

    def post_init_from_model(self, model: Any) -> None:
        """Pass on."""
        self.press.post_init_from_model(model)

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        """Gather the best in ascending order, with what is spared ranked first."""
        if self.compression_ratio == 0:
            return keys, values
        self.press.compression_ratio = self.compression_ratio
        own = torch.arange(-hidden_states.shape[1], 0) + int(kwargs["position_ids"][0, -1]) + 1
        kwargs = {**kwargs, "position_embeddings": module.rotary_emb(hidden_states, own.unsqueeze(0))}
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs).clone()
        scores[..., : self.head] = scores[..., scores.shape[-1] - self.tail :] = float("inf")
        best = scores.topk(compute_n_kept(keys.shape[2], self.compression_ratio), dim=-1).indices.sort(-1).values
        best = best.unsqueeze(-1).expand(-1, -1, -1, module.head_dim)
        return keys.gather(2, best), values.gather(2, best)


def decoding_press(method: str, guarded: bool, prompt: int, budget: int, interval: int) -> Any:
    """``DecodingPress`` of a method for one prompt (tokens); see the module about the settings."""
    recent = from_mapping({"budget": {"tokens": budget}}).recent
    window = min(recent, interval - 1)  # DecodingPress has the hidden states of no more than interval steps
    base = {
        "streaming": lambda: kvpress.StreamingLLMPress(n_sink=prompt if guarded else SINKS),
        "random": kvpress.RandomPress,
        "tova": kvpress.TOVAPress,
        "snapkv": lambda: kvpress.SnapKVPress(window_size=window),
        "keydiff": kvpress.KeyDiffPress,
        "knorm": kvpress.KnormPress,
    }[method]()
    press = Guarded(press=base, head=prompt, tail=recent) if guarded else base
    return kvpress.DecodingPress(press, compression_interval=interval, target_size=prompt + budget)


# -- scores side by side ---------------------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """How a kvpress method and ours rank the tokens of a layer: largest difference over range, share of equal sets."""

    method: str
    layer: int
    difference: float
    equal: float


def layer_inputs(network: Any, ids: torch.Tensor) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor, Any, dict]]:
    """Yield attention module, hidden states, attentions, cache and keyword arguments of each layer of one forward."""
    caught: dict[int, tuple[Any, torch.Tensor, torch.Tensor, dict]] = {}

    def catch(module: Any, args: Any, kwargs: dict, output: Any) -> None:
        caught[module.layer_idx] = (module, kwargs["hidden_states"], output[1], kwargs)

    cache, before = DynamicCache(), network.config._attn_implementation
    network.set_attn_implementation("eager")
    hooks = [layer.self_attn.register_forward_hook(catch, with_kwargs=True) for layer in network.model.layers]
    network(input_ids=ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    network.set_attn_implementation(before)
    for index in sorted(caught):
        module, hidden, attentions, kwargs = caught[index]
        yield module, hidden, attentions, cache.layers[index], kwargs


def our_rank(policy: Policy, keys: torch.Tensor, queries: torch.Tensor | None, count: int, total: int) -> torch.Tensor:
    """Rank the first ``count`` of ``total`` tokens with our code; keys ``[n, Hkv, D]``, queries ``[Q, H, D]``."""
    valid = torch.ones(1, 1, count, dtype=torch.bool)
    position = torch.arange(count, dtype=torch.int32).view(1, 1, -1)
    score = feature = None
    if queries is not None:
        rule = policy.accumulation or Accumulation()
        seen = observation_attention(queries, keys, torch.arange(total), keys.shape[2] ** -0.5, len(queries))
        score = replay(rule, seen)[0][:count].view(1, 1, -1)
    if policy.uses_keys:
        feature = policy.key_feature(keys[None, :count], valid[0]).unsqueeze(0)
    return policy.rank(Candidates(score, position, None, feature, valid, torch.tensor([total])))[0, 0]


def compare(method: str, layer: int, theirs: torch.Tensor, ours: torch.Tensor, pinned: int = 0) -> Agreement:
    """Compare two rankings of the same tokens, up to scale, and the sets kept at a quarter and half of them."""
    n = len(ours)
    scale = float(ours.max() - ours.min()) or 1.0
    pins = (torch.arange(n) < pinned).unsqueeze(0)
    everyone, equal = torch.ones(1, n, dtype=torch.bool), []
    for count in (n // 4, n // 2):
        kept = [select(rank.unsqueeze(0), everyone, pins, torch.tensor([count])) for rank in (theirs, ours)]
        equal.append(torch.equal(*kept))
    return Agreement(method, layer, float((theirs - ours).abs().max()) / scale, sum(equal) / len(equal))


@torch.no_grad()
def agreements(model: Model, ids: torch.Tensor, window: int = 16) -> list[Agreement]:
    """Rank the tokens of one text with both, in every layer."""
    found, n = [], ids.shape[1]
    for layer, (module, hidden, attentions, store, kwargs) in enumerate(layer_inputs(model.network, ids)):
        queries = get_prerope_query_states(module, hidden)
        queries = apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])[0][0].transpose(0, 1)
        keys, values = store.keys, store.values
        flat = keys[0].transpose(0, 1)

        def theirs(press: Any, attentions: Any = None, at: tuple = (module, hidden, keys, values, kwargs)) -> Any:
            return press.score(*at[:4], attentions, at[4])[0]

        for head, score in enumerate(theirs(kvpress.KeyDiffPress())):
            ours = our_rank(POLICIES["keydiff"](), flat[:, head : head + 1], None, n, n)
            found.append(compare("keydiff", layer, score, ours))
        score = theirs(kvpress.TOVAPress(), attentions).mean(0)[:-1]
        found.append(compare("tova", layer, score, our_rank(POLICIES["tova"](), flat, queries[-1:], n - 1, n)))
        score = theirs(kvpress.SnapKVPress(window_size=window)).mean(0)[:-window] * window
        ours = our_rank(POLICIES["snapkv"](window, 5), flat, queries[-window:], n - window, n)
        found.append(compare("snapkv", layer, score, ours))
        score = theirs(kvpress.ObservedAttentionPress(), attentions).mean(0) * torch.arange(n, 0, -1)
        found.append(compare("h2o", layer, score, our_rank(POLICIES["h2o"](), flat, queries, n, n)))
        place = our_rank(POLICIES["streaming"](), flat, None, n, n)
        equal = []
        for count in (n // 4, n // 2):
            score = theirs(kvpress.StreamingLLMPress((n - count + 0.5) / n, SINKS))[0]
            pins = (torch.arange(n) < SINKS).unsqueeze(0)
            kept = select(place.unsqueeze(0), torch.ones_like(pins), pins, torch.tensor([int(score.sum())]))
            equal.append(torch.equal(kept[0], score > 0))
        found.append(Agreement("streaming", layer, 0.0, sum(equal) / len(equal)))
    return found


# -- problems --------------------------------------------------------------------------------------------------------


def dev_items(family: str, count: int) -> list[Item]:
    """Problems of models/reasoner-dev, which has two formats of its own."""
    made, items = runpy.run_path(str(ROOT / "tests" / "engine" / "problems.py")), []
    for index in range(count):
        if family == "walk":
            question, reference = made["walk"](index)
            ask = (question, reference[-1], lambda text, right=reference[-1]: text[-2:] == f".{right}", reference)
        else:
            question, right = made["definitions"](index)
            ask = (question, right, lambda text, right=right: "".join(re.findall(r"\.(\d)", text)) == right, "x" * 180)
        items.append(Item(f"{family}/{index}", family, *ask))
    return items


def load_items(model: Model, arguments: argparse.Namespace) -> list[Item]:
    """Return the problems that the model was trained for."""
    if THINK in model.tokenizer.get_vocab():
        tokens = (arguments.tokens[0], arguments.tokens[1])
        families = arguments.families or TRAINED
        return [i for f in families for i in family_items(f, arguments.split, arguments.problems, tokens)]
    return [i for f in arguments.families or ("chain", "walk") for i in dev_items(f, arguments.problems)]


def our_records(directory: Path | None, items: list[Item], budgets: list[int], interval: int) -> list[Record]:
    """Read what ``lethe eval run`` got on the same problems: arms called ``policy@budget``, and ``full``."""
    found: list[Record] = []
    questions = {item.id: item.prompt for item in items}
    if directory is not None:
        grid = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))["experiment"]["grid"] or {}
        if other := {p["interval"] for p in grid.get("budgets", ()) if p["tokens"] in budgets} - {interval}:
            sys.exit(f"error: {directory} has rounds every {min(other)} tokens; give that as --interval")
    for path in sorted((directory / "generations").glob("*.jsonl")) if directory is not None else []:
        policy, _, budget = path.stem.partition("@")
        if path.stem != "full" and budget not in map(str, budgets):
            continue
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line["id"] not in questions or line["sample"]:
                continue
            if line["question"] != questions[line["id"]]:
                sys.exit(f"error: {path}: {line['id']} is not the same problem; give its --split and --tokens")
            family, _, index = line["id"].rpartition("/")
            same = {"policy": f"lethe/{policy}", "budget": int(budget or 0), "family": family, "index": int(index)}
            found.append({**same, "ok": line["ok"], "tokens": line["tokens"]})
    return found


# -- runs ------------------------------------------------------------------------------------------------------------


def run_all(model: Model, items: list[Item], arguments: argparse.Namespace) -> list[Record]:
    """Answer every problem with every method at every budget; what the output file has is not done again."""
    path: Path = arguments.json
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    settings = [model.digest, version("kvpress"), arguments.interval, arguments.split, *arguments.tokens]
    run = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    if any(r["run"] != run for r in records):
        sys.exit(
            f"error: {path.name} holds records of another model or other settings; give another --json or remove it"
        )
    done = {(r["policy"], r["budget"], r["family"], r["index"]) for r in records}
    arms: list[tuple[str, int, str | None, bool]] = [("kvpress/full", 0, None, False)]
    for budget in arguments.budgets:
        arms += [(f"kvpress/{m}", budget, m, False) for m in arguments.methods]
        arms += [(f"kvpress/{m}+prompt", budget, m, True) for m in arguments.methods]
    for policy, budget, method, guarded in arms:
        for item in items:
            family, _, index = item.id.rpartition("/")
            if (policy, budget, family, int(index)) in done:
                continue
            torch.manual_seed(random.Random(f"{policy}/{budget}/{item.id}").getrandbits(32))
            prompt = model.encode(item.prompt)
            limit = 2 * len(model.tokenizer(item.reference, add_special_tokens=False)["input_ids"])
            press = None
            if method is not None:
                press = decoding_press(method, guarded, prompt.shape[1], budget, arguments.interval)
            text, length, peak = model.generate(prompt, limit, press)
            bound = prompt.shape[1] + budget + arguments.interval
            assert press is None or peak <= bound, f"{policy}: {peak} tokens in the cache, {bound} allowed"
            where = {"policy": policy, "budget": budget, "family": family, "index": int(index)}
            held = {"tokens": length, "peak": peak - prompt.shape[1]}
            records.append({**where, "ok": item.grade(text), **held, "run": run})
            path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
        mine = [r for r in records if r["policy"] == policy and r["budget"] == budget]
        print(f"{policy:24} {budget or 'all':>5}  {sum(r['ok'] for r in mine)} of {len(mine)} right", flush=True)
    return records


# -- the page --------------------------------------------------------------------------------------------------------


def page(records: list[Record], found: list[Agreement], model: str, arguments: argparse.Namespace) -> str:
    """Write the results as Markdown."""
    families = list(dict.fromkeys(r["family"] for r in records))
    versions = ", ".join(f"{name} {version(name)}" for name in ("kvpress", "transformers", "torch"))
    command = " ".join(["bash scripts/kvpress.sh", *arguments.shown])
    count = max(sum(r["family"] == f and r["policy"] == "kvpress/full" for r in records) for f in families)
    pilot = " **A pilot: too few problems to tell methods apart.**" if count < 50 else ""
    lines = [
        f"""# Against kvpress

Model {model}, {versions}, float32 on a CPU. Written by `{command}`.{pilot}

## The same scores

One reply of the model, every layer: the largest difference between kvpress's scores and ours, over their range, and how
often both keep the same tokens (a quarter and half of them).

| method | rankings | largest difference | same tokens kept |
| --- | --- | --- | --- |"""
    ]
    for method in dict.fromkeys(a.method for a in found):
        mine = [a for a in found if a.method == method]
        worst, same = max(a.difference for a in mine), sum(a.equal for a in mine) / len(mine)
        lines.append(f"| {method} | {len(mine)} | {worst:.1e} | {same:.1%} |")
    lines.append(f"""
keydiff: per KV head. snapkv, h2o: mean over KV heads; kvpress's ObservedAttentionPress divides by the number of
queries, which is taken back here. streaming: the sets only.

## The same problems

Greedy, {count} problems a family, share right with its 95 % Wilson interval. `budget` counts own tokens after a
compression (kvpress is given prompt + budget), every {arguments.interval} tokens. `peak` is the mean over problems
of the most own tokens in the cache.

| method | budget | {" | ".join(families)} | peak |
| --- | --- |{" --- |" * (len(families) + 1)}""")
    for policy, budget in dict.fromkeys((r["policy"], r["budget"]) for r in records):
        mine = [r for r in records if r["policy"] == policy and r["budget"] == budget]
        cells = []
        for family in families:
            marks = [r["ok"] for r in mine if r["family"] == family]
            low, high = wilson(sum(marks), len(marks)) if marks else (0.0, 0.0)
            cells.append(f"{sum(marks) / len(marks):.2f} ({low:.2f} to {high:.2f})" if marks else "-")
        peaks = [r["peak"] for r in mine if "peak" in r]
        peak = f"{sum(peaks) / len(peaks):.0f}" if peaks else "-"
        lines.append(f"| {policy} | {budget or 'all'} | {' | '.join(cells)} | {peak} |")
    assert __doc__ is not None
    differences = __doc__[__doc__.index("* kvpress keeps") : __doc__.index("Writes ``--json``")].replace("``", "`")
    return "\n".join([*lines, "", "## What differs", "", differences.strip(), ""])


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description="Compare with kvpress.", allow_abbrev=False)
    parser.add_argument("--model", default="models/reasoner", help="directory of the model")
    parser.add_argument("--families", nargs="*", help="families of problems; all that the model was trained for")
    parser.add_argument("--problems", type=int, default=25, help="problems a family")
    parser.add_argument("--split", default="test", help="as in the experiment behind --results")
    parser.add_argument("--tokens", type=int, nargs=2, default=(200, 560), help="lengths of reference chains, likewise")
    parser.add_argument("--budgets", type=int, nargs="*", default=[64, 128], help="own tokens after a compression")
    parser.add_argument("--interval", type=int, default=16, help="decode steps between compressions")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, help="methods of kvpress")
    parser.add_argument("--results", type=Path, help="directory that lethe eval run wrote, to stand beside")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "kvpress.json", help="records, resumed if there")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "kvpress.md", help="page to write")
    arguments = parser.parse_args()
    arguments.shown = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    torch.set_grad_enabled(False)
    model = Model(arguments.model)
    items = load_items(model, arguments)
    prompt = model.encode(items[0].prompt)
    answer = model.tokenizer(model.generate(prompt, 400, None)[0], add_special_tokens=False, return_tensors="pt")
    found = agreements(model, torch.cat([prompt, answer["input_ids"]], 1))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    ours = our_records(arguments.results, items, arguments.budgets, arguments.interval)
    records = [*run_all(model, items, arguments), *ours]
    arguments.page.write_text(page(records, found, Path(arguments.model).name, arguments), encoding="utf-8")
    print(f"wrote {arguments.page.name}")


if __name__ == "__main__":
    main()
