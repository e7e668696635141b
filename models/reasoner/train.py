#!/usr/bin/env python3
"""Train the bundled reasoner from scratch on generated problems, or check the shipped weights.

python models/reasoner/train.py            train (resumes from out/reasoner; Ctrl-C is safe) and export
python models/reasoner/train.py --check    solve --problems N a family with full KV, greedy; exit 1 below 95 %
python models/reasoner/train.py --export   write models/reasoner from the last checkpoint

Two CPU cores need an afternoon, a GPU minutes. First a copying curriculum until look-up forms (repeated random blocks
and key-value look-ups), then the problems with growing length. Data, order and initialisation follow from --seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lethe_bench.statistics import wilson  # noqa: E402
from lethe_bench.tasks import (  # noqa: E402
    END_THINK,
    FAMILIES,
    INDICES,
    NAMES,
    PUNCTUATION,
    RESULTS,
    THINK,
    TOKEN_PATTERN,
    TRAINED,
    Problem,
    problem,
    tokens_of,
)

MODEL = ROOT / "models" / "reasoner"
STATE = ROOT / "out" / "reasoner"
PAD, BOS, EOS = 0, 1, 2
VOCAB = [
    "<pad>",
    "<bos>",
    "<eos>",
    THINK,
    END_THINK,
    *"0123456789",
    *PUNCTUATION,
    *RESULTS,
    *INDICES,
    *NAMES,
    *NAMES.upper(),
    *(f"{name}'" for name in NAMES),
]
TOKEN = {text: i for i, text in enumerate(VOCAB)}
VOCAB_SIZE = 288


class Stage(NamedTuple):
    """Part of the curriculum.

    ``steps`` batches of about ``tokens`` tokens in rows of one of ``lengths``, the learning rate going linearly from
    ``first`` to ``last`` times its peak.
    """

    kind: str
    lengths: tuple[int, ...]
    tokens: int
    steps: int
    first: float
    last: float
    ends: float = 1.0
    """Weight in the loss of a reply's first token and of its answer, since a chain has one beginning and one end."""
    forgetting: float = 0.0
    """Part of the rows whose queries no longer see some of the reply's older tokens (see :func:`forgetful`)."""


STAGES = (
    Stage("copy", (64,), 4096, 500, 1.0, 1.0),
    Stage("tasks", (128, 192), 6144, 400, 1.0, 1.0),
    Stage("tasks", (192, 320), 6144, 500, 1.0, 0.6),
    Stage("tasks", (320, 512, 768), 6144, 500, 0.6, 0.25, ends=8.0),
    Stage("late", (192, 320, 512), 6144, 300, 0.25, 0.1, ends=8.0),
    Stage("late", (512, 1024, 2048), 6144, 150, 0.1, 0.0, ends=8.0),
    Stage("late", (320, 512, 768, 768, 1024), 6144, 480, 0.35, 0.0, ends=8.0),
    Stage("last", (320, 512, 768), 6144, 190, 0.25, 0.0, ends=8.0),
    Stage("polish", (512, 768, 768), 6144, 30, 0.0, 0.25, ends=8.0),
    Stage("polish", (512, 768, 768), 6144, 300, 0.25, 0.0, ends=8.0),
    Stage("final", (512, 768, 768), 6144, 30, 0.0, 0.4, ends=8.0),
    Stage("final", (512, 768, 768), 6144, 420, 0.4, 0.0, ends=8.0),
    Stage("even", (768,), 6144, 20, 0.0, 0.25, ends=8.0),
    Stage("even", (768,), 6144, 250, 0.25, 0.0, ends=8.0),
    Stage("even", (768,), 6144, 20, 0.0, 0.3, ends=8.0, forgetting=0.7),
    Stage("even", (768,), 6144, 330, 0.3, 0.0, ends=8.0, forgetting=0.7),
    Stage("window", (768,), 6144, 20, 0.0, 0.3, ends=8.0, forgetting=0.6),
    Stage("window", (768,), 6144, 240, 0.3, 0.0, ends=8.0, forgetting=0.6),
)
TOTAL = sum(stage.steps for stage in STAGES)
MIX = ("chain", "addition", "script", "walk", "chain", "script", "recall", "addition")
LATE_MIX = ("script", "recall", "addition", "script", "chain", "script", "walk", "recall")
LAST_MIX = ("recall", "script", "recall", "chain", "recall", "script", "walk", "addition")
POLISH_MIX = ("script", "addition", "script", "recall", "script", "chain", "addition", "script")
FINAL_MIX = ("script", "walk", "script", "recall", "script", "chain", "script", "addition")
EVEN_MIX = ("script", "recall", "script", "walk", "addition", "chain", "script", "recall")
WINDOW_MIX = ("addition", "chain", "script", "addition", "chain", "recall", "script", "walk")
LONG_MIX = ("addition", "walk", "script", "recall", "addition", "script")
MIXES = {
    "copy": ("copy",),
    "tasks": MIX,
    "late": LATE_MIX,
    "last": LAST_MIX,
    "polish": POLISH_MIX,
    "final": FINAL_MIX,
    "even": EVEN_MIX,
    "window": WINDOW_MIX,
}
LONG = 700
"""Rows of more tokens than this are left to the families that fill them."""
WARMUP = 100
RATE, MATRIX_RATE = 3e-3, 2e-2


def architecture() -> Qwen3Config:
    """Qwen3, 6 layers, 4 query heads on 2 KV heads of 64, 1.3M parameters."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attention_bias=False,
        use_cache=True,
        dtype="float32",
    )


# -- data --------------------------------------------------------------------------------------------------------------


def encode(item: Problem) -> tuple[list[int], int]:
    """Tokens of a solved problem and how many of them are the prompt."""
    prompt = [BOS, *(TOKEN[t] for t in tokens_of(item.question)), TOKEN[THINK]]
    reply = [*(TOKEN[t] for t in tokens_of(item.thinking + END_THINK + item.answer)), EOS]
    return prompt + reply, len(prompt)


SYMBOLS = range(5, len(VOCAB))


def copying(rng: random.Random, length: int) -> tuple[list[int], int]:
    """Make a repeated random block, or key-value pairs and queries for them; short ones as often as long ones."""
    size = round(math.exp(rng.uniform(math.log(3), math.log(length // 2))))
    if rng.random() < 0.5:
        return (rng.choices(SYMBOLS, k=size) * length)[:length], size
    size = max(size * 2 // 3, 2)
    keys = rng.sample(SYMBOLS, size)
    values = dict(zip(keys, rng.choices(SYMBOLS, k=size), strict=True))
    pairs = [t for key in keys for t in (key, values[key])]
    queries = [t for key in rng.choices(keys, k=length) for t in (key, values[key])]
    return (pairs + queries)[:length], len(pairs)


def fitting(rng: random.Random, family: str, length: int, even: bool) -> tuple[list[int], int]:
    """Draw a problem of a family that fits ``length`` tokens, of all lengths alike or longer ones more often."""
    kind = FAMILIES[family]
    share = rng.uniform(0.15, 0.95) if even else rng.uniform(0.5, 0.95)
    while True:
        tokens = max(int(length * share), kind.shortest // 2)
        ids, prompt = encode(kind.generate(rng, min(tokens, kind.longest)))
        if len(ids) <= length:
            return ids, prompt
        share = rng.uniform(0.15, 0.95) if even else share * 0.85


def batch(seed: int, step: int, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Return the step's inputs, labels (-100 in prompts and padding) and weights, ``[rows, length]``, and kinds."""
    rng = random.Random(f"train/{seed}/{step}")
    length = stage.lengths[step % len(stage.lengths)]
    rows = stage.tokens // length
    inputs = torch.full((rows, length), PAD)
    labels = torch.full((rows, length), -100)
    weights = torch.ones(rows, length)
    mix = LONG_MIX if length > LONG and stage.kind in ("tasks", "late") else MIXES[stage.kind]
    kinds = [mix[(row + step) % len(mix)] for row in range(rows)]
    for row, kind in enumerate(kinds):
        even = stage.kind in ("even", "window")
        ids, prompt = copying(rng, length) if kind == "copy" else fitting(rng, kind, length, even)
        line = torch.tensor(ids)
        inputs[row, : len(ids)] = line
        labels[row, prompt : len(ids)] = line[prompt:]
        if kind != "copy":
            weights[row, prompt] = stage.ends
            weights[row, ids.index(TOKEN[END_THINK]) :] = stage.ends
    return inputs, labels, weights, kinds


def forgetful(
    seed: int, step: int, labels: torch.Tensor, share: float, shortest: int = 8, recent: float = 0.0
) -> torch.Tensor:
    """Return a causal mask in which some rows forget: True where a query sees a key, ``[rows, 1, length, length]``.

    In a forgetting row every token of the reply is at random one that is forgotten or one that stays, for the whole
    row; one that is forgotten is seen by the next queries only, at least ``shortest`` of them. In the part ``recent``
    of the forgetting rows every token is one of those. Which ones does not depend on attention, so no policy is
    favoured but ``random`` and ``streaming``. It teaches the model not to lean on every copy of a token, as dropout
    would.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows, length = labels.shape
    position = torch.arange(length)
    age = position.unsqueeze(1) - position
    draw = torch.rand(rows, 3, generator=rng)
    window = (shortest * 8 ** draw[:, 0]).view(-1, 1, 1)
    staying = ((draw[:, 1:2] - recent) / (1 - recent)).clamp(min=0)
    stays = torch.rand(rows, length, generator=rng) < staying
    forgets = (draw[:, 2:] < share) & (labels >= 0) & ~stays
    return ((age >= 0) & ~(forgets.unsqueeze(1) & (age > window))).unsqueeze(1)


def schedule() -> Iterator[tuple[Stage, float]]:
    """Yield the stage of every step and its learning rate over the peak."""
    step = 0
    for stage in STAGES:
        for i in range(stage.steps):
            step += 1
            yield stage, min(step / WARMUP, stage.first + (stage.last - stage.first) * i / stage.steps)


# -- training ----------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, in float32 and for all matrices of a shape at once.

    ``torch.optim.Muon`` iterates in bfloat16, which takes a CPU as long as the whole backward pass of this model.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One Nesterov step along the orthogonal factor of the momentum (five Newton-Schulz iterations)."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                directions = []
                for p in params:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    directions.append(p.grad.lerp(velocity, group["momentum"]))
                x = torch.stack(directions)
                x = x.mT if rows > columns else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if rows > columns else x
                for p, update in zip(params, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, lr=MATRIX_RATE),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save(path: Path, model: Any, optims: list[torch.optim.Optimizer], step: int, seed: int) -> None:
    """Write a checkpoint atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optims": [o.state_dict() for o in optims], "step": step, "seed": seed}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(args: argparse.Namespace) -> None:
    """Train, from the last checkpoint if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(architecture()).to(device).train()
    optims = optimizers(model)
    path, first = args.state / "checkpoint.pt", 0
    if path.exists() and not args.restart:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        first = state["step"]
        if state["seed"] != args.seed:
            raise SystemExit(f"--seed: {path} was made with --seed {state['seed']}; use it, or --restart")
    step, deadline = first, time.monotonic() + 60 * args.minutes
    torch._dynamo.config.recompile_limit = 64  # one graph for every shape of the curriculum
    forward = torch.compile(model, dynamic=False) if args.compile else model
    seen: dict[str, list[int]] = {}
    try:
        with tqdm(total=TOTAL, initial=first, unit="step", dynamic_ncols=True) as bar, log_file(args) as log:
            for step, (stage, pace) in itertools.islice(enumerate(schedule()), first, None):
                if time.monotonic() > deadline:
                    print(f"\n--minutes {args.minutes} are over at step {step}; run again to go on")
                    return
                began = time.perf_counter()
                *tensors, kinds = batch(args.seed, step, stage)
                inputs, labels, weights = (t.to(device) for t in tensors)
                for optim, peak in zip(optims, (MATRIX_RATE, RATE), strict=True):
                    for group in optim.param_groups:
                        group["lr"] = peak * pace
                mask = None
                if stage.forgetting:
                    kind = (16, 0.5) if stage.kind == "window" else (8, 0.0)
                    mask = forgetful(args.seed, step, labels.cpu(), stage.forgetting, *kind).to(device)
                logits = forward(input_ids=inputs, attention_mask=mask).logits[:, :-1]
                target = labels[:, 1:]
                wanted = target >= 0
                losses = torch.nn.functional.cross_entropy(logits[wanted].float(), target[wanted], reduction="none")
                loss = torch.dot(losses, weights[:, 1:][wanted]) / weights[:, 1:][wanted].sum()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optim in optims:
                    optim.step()
                    optim.zero_grad(set_to_none=True)
                hits = ((logits.argmax(-1) == target) & wanted).sum(1).tolist()
                right = sum(hits) / int(wanted.sum())
                took = time.perf_counter() - began
                for kind, hit, count in zip(kinds, hits, wanted.sum(1).tolist(), strict=True):
                    tally = seen.setdefault(kind, [0, 0, 0, 0])
                    for i, n in enumerate((hit, count, hit == count, 1)):
                        tally[i] += n
                speed = int(inputs.numel() / took)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.4f}", token=f"{right:.4f}", length=inputs.shape[1], tps=speed)
                if step % 20 == 19:
                    kinds_right = {k: [round(a / b, 4), round(c / d, 3)] for k, (a, b, c, d) in sorted(seen.items())}
                    line = {"step": step, "loss": round(loss.item(), 5), "tps": speed, "token, exact": kinds_right}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    seen.clear()
                if (step + 1) % 100 == 0:
                    save(path, model, optims, step + 1, args.seed)
            step = TOTAL
    except KeyboardInterrupt:
        print(f"\nstopped at step {step}; run again to go on")
    finally:
        save(path, model, optims, step, args.seed)
    if step == TOTAL:
        export(args)


def log_file(args: argparse.Namespace) -> TextIO:
    """Open the training log for appending."""
    return (args.state / "log.jsonl").open("a")


# -- the model directory -----------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{{ '<think>' }}"
)


def export(args: argparse.Namespace) -> None:
    """Write weights, tokenizer, chat template and prompts for ``lethe profile`` to the model directory."""
    state = torch.load(args.state / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = Qwen3ForCausalLM(architecture())
    model.load_state_dict(state["model"])
    model.save_pretrained(args.model)
    tokenizer = Tokenizer(models.WordLevel(TOKEN, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(args.model)
    items = [problem(family, "profile", i, (200, 400)) for i in range(4) for family in TRAINED]
    lines = [json.dumps({"prompt": item.question}) + "\n" for item in items]
    (args.model / "lethe_prompts.jsonl").write_text("".join(lines))
    print(f"{args.model}: step {state['step']} of {TOTAL}")


# -- the check ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def solve(model: Any, items: list[Problem], rows: int = 32) -> list[bool]:
    """Decode greedily with full KV and verify the answers.

    A chain whose every token is the most likely one after those before it is what greedy decoding writes, so only the
    others are decoded.
    """
    solved = [encode(item) for item in items]
    right = [False] * len(items)
    for part in batches(range(len(items)), lambda i: len(solved[i][0]), rows):
        width = max(len(solved[i][0]) for i in part)
        inputs = torch.tensor([solved[i][0] + [PAD] * (width - len(solved[i][0])) for i in part])
        best = model(input_ids=inputs).logits.argmax(-1)
        for row, i in enumerate(part):
            ids, prompt = solved[i]
            right[i] = torch.equal(best[row, prompt - 1 : len(ids) - 1], inputs[row, prompt : len(ids)])
    derailed = [i for i in range(len(items)) if not right[i]]
    for part in batches(derailed, lambda i: solved[i][1], rows):
        width = max(solved[i][1] for i in part)
        prompts = [solved[i][0][: solved[i][1]] for i in part]
        inputs = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
        limit = max(math.ceil(1.25 * (len(solved[i][0]) - solved[i][1])) for i in part)
        out = model.generate(inputs, attention_mask=(inputs != PAD).long(), max_new_tokens=limit, do_sample=False)
        for i, line in zip(part, out[:, width:].tolist(), strict=True):
            text = "".join(VOCAB[t] for t in line if t not in (PAD, BOS, EOS))
            right[i] = END_THINK in text and FAMILIES[items[i].family].verify(items[i], text)
    return right


def batches(indices: Iterable[int], size: Callable[[int], int], rows: int) -> Iterator[list[int]]:
    """Yield batches of ``rows`` indices of like size."""
    ordered = sorted(indices, key=size)
    yield from (ordered[start : start + rows] for start in range(0, len(ordered), rows))


def check(args: argparse.Namespace) -> int:
    """Print accuracy per family with its Wilson interval; 1 if a trained one is below 95 %."""
    model = Qwen3ForCausalLM.from_pretrained(args.model).eval()
    low = []
    for family in args.families:
        items = [problem(family, args.split, i, tuple(args.tokens)) for i in range(args.problems)]
        right = sum(solve(model, items))
        interval = wilson(right, len(items))
        note = "" if family in TRAINED else " (held out of training)"
        share = f"{right / len(items):.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
        print(f"{family:10} {right:4} / {len(items)}  {share}{note}", flush=True)
        if family in TRAINED and right < 0.95 * len(items):
            low.append(family)
    if low:
        print(f"below 95 %: {', '.join(low)}")
    return bool(low)


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="verify the shipped weights")
    parser.add_argument("--export", action="store_true", help="write the model directory and stop")
    parser.add_argument("--problems", type=int, default=50, help="problems a family to check")
    parser.add_argument("--tokens", type=int, nargs=2, default=(200, 400), help="range of chain lengths to check")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families to check")
    parser.add_argument("--split", default="check", help="seed range of the problems to check")
    parser.add_argument("--model", type=Path, default=MODEL, help="model directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (resumably) after so many minutes")
    parser.add_argument("--restart", action="store_true", help="ignore a checkpoint")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--state", type=Path, default=STATE)
    args = parser.parse_args()
    if args.check:
        return check(args)
    args.state.mkdir(parents=True, exist_ok=True)
    if args.export:
        export(args)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
