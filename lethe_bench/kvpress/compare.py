"""Compare with kvpress, NVIDIA's reference implementations of KV eviction on Hugging Face transformers.

bash lethe_bench/kvpress/compare.sh                    set up an environment for kvpress and run this in it
bash lethe_bench/kvpress/compare.sh --results DIR      with the accuracies that lethe eval run left in DIR beside them
bash lethe_bench/kvpress/compare.sh --model models/reasoner-dev --problems 4

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

Writes ``--records``, lines of {policy, budget, family, index, ok, tokens, peak} that are taken up if they exist, and
``--page``.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from lethe_bench.accuracy.datasets import Item, family_items
from lethe_bench.kvpress.decode import Model, decoding_press
from lethe_bench.kvpress.scores import Agreement, agreements
from lethe_bench.statistics import wilson
from lethe_bench.tasks import THINK, TRAINED
from lethe_sglang.files import Journal, read_lines, write_atomically

ROOT = Path(__file__).parents[2]
METHODS = ("streaming", "random", "tova", "snapkv", "keydiff", "knorm")
Record = dict[str, Any]


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
        for line in read_lines(path):
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
    settings = [model.digest, version("kvpress"), arguments.interval, arguments.split, *arguments.tokens]
    journal = Journal(arguments.records, {"run": hashlib.sha256(repr(settings).encode()).hexdigest()[:12]})
    records = journal.read()
    if arguments.records.exists() and not records:
        sys.exit(
            f"error: {arguments.records.name} holds records of another model or other settings, or none; give another "
            "--records or remove it"
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
            records.append({**where, "ok": item.grade(text), **held})
            journal.add(records[-1:])
        mine = [r for r in records if r["policy"] == policy and r["budget"] == budget]
        print(f"{policy:24} {budget or 'all':>5}  {sum(r['ok'] for r in mine)} of {len(mine)} right", flush=True)
    return records


# -- the page --------------------------------------------------------------------------------------------------------


def page(records: list[Record], found: list[Agreement], model: str, arguments: argparse.Namespace) -> str:
    """Write the results as Markdown."""
    families = list(dict.fromkeys(r["family"] for r in records))
    versions = ", ".join(f"{name} {version(name)}" for name in ("kvpress", "transformers", "torch"))
    command = " ".join(["bash lethe_bench/kvpress/compare.sh", *arguments.shown])
    count = max(sum(r["family"] == f and r["policy"] == "kvpress/full" for r in records) for f in families)
    pilot = ", and too few problems to tell methods apart" if count < 50 else ""
    lines = [
        f"""# Against kvpress

**One small model on a CPU{pilot}: this says nothing about a large model.**

Model {model}, {versions}, float32 on a CPU. Written by `{command}`.

## The same scores

One reply of the model, every layer: the largest difference between kvpress's scores and ours, over their range, and how
often both keep the same tokens (a quarter and half of them).

| method | rankings | largest difference | same tokens kept |
| --- | --- | --- | --- |"""
    ]
    for method in dict.fromkeys(a.method for a in found):
        these = [a for a in found if a.method == method]
        worst, same = max(a.difference for a in these), sum(a.equal for a in these) / len(these)
        lines.append(f"| {method} | {len(these)} | {worst:.1e} | {same:.1%} |")
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
    differences = __doc__[__doc__.index("* kvpress keeps") : __doc__.index("Writes ``--records``")].replace("``", "`")
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
    parser.add_argument(
        "--records", type=Path, default=ROOT / "out" / "kvpress.jsonl", help="records, taken up if they are there"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "kvpress.md", help="page to write")
    arguments = parser.parse_args()
    arguments.shown = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    torch.set_grad_enabled(False)
    model = Model(arguments.model)
    items = load_items(model, arguments)
    prompt = model.encode(items[0].prompt)
    answer = model.tokenizer(model.generate(prompt, 400, None)[0], add_special_tokens=False, return_tensors="pt")
    found = agreements(model, torch.cat([prompt, answer["input_ids"]], 1))
    ours = our_records(arguments.results, items, arguments.budgets, arguments.interval)
    records = [*run_all(model, items, arguments), *ours]
    write_atomically(arguments.page, page(records, found, Path(arguments.model).name, arguments))
    print(f"wrote {arguments.page.name}")


if __name__ == "__main__":
    main()
