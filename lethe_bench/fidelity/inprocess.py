"""Fidelity without a server: the same numbers (``replay.py``), a process a document."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lethe_bench.fidelity.corpora import Document
from lethe_bench.fidelity.network import Network
from lethe_bench.fidelity.processor import keep
from lethe_bench.fidelity.replay import Full, Replay, full, together
from lethe_bench.fidelity.report import AGREEMENT, KL, NLL, ROUNDS
from lethe_bench.fidelity.run import Run
from lethe_sglang.allocation import profile as profiles
from lethe_sglang.allocation.budgets import from_config
from lethe_sglang.config import ConfigError, EvictionConfig
from lethe_sglang.files import Journal

SAMPLED_TOGETHER = 15
"""Own samples that are written in one batch."""


@dataclass(kw_only=True)
class InProcess(Run):
    """As :class:`Run`, without a server.

    Attributes
    ----------
    jobs
        Processes, each with the model and one document; each has one thread if there are several.
    """

    jobs: int = 1

    def all(self) -> None:
        """Force every reply that an arm lacks.

        Raises
        ------
        ConfigError
            If the directory holds results of another experiment, or an arm cannot be replayed.
        """
        from transformers import AutoConfig, AutoTokenizer

        configs = self.experiment.configs()
        layers = int(AutoConfig.from_pretrained(self.model).num_hidden_layers)
        for config in configs.values():  # refused now, not when its turn comes
            budgets(config, layers)
        self.check_out()
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        prompts, made = self.prompts(tokenizer), self.documents(tokenizer)
        self._write_samples(prompts, tokenizer.eos_token_id)
        documents = [*self.samples(prompts), *made]
        self.note(documents)
        corpora = [[d for d in documents if d.name.startswith(f"{corpus}-")] for corpus in self.experiment.corpora]
        documents = [d for row in zip_longest(*corpora) for d in row if d is not None]  # stopped early, it is even
        tasks = list[tuple[Document, dict[str, EvictionConfig]]]()
        for document in documents:
            if lacking := {arm: config for arm, config in configs.items() if self.missing(arm, [document])}:
                tasks.append((document, lacking))
        for arm in configs:
            (self.out / arm).mkdir(exist_ok=True)
        progress = tqdm(total=sum(len(arms) for _, arms in tasks), file=sys.stderr, disable=not tasks)
        journal = Journal(self.out / ROUNDS)
        with progress, self._workers() as pool:
            work = [pool.submit(force, document, arms, str(self.out)) for document, arms in tasks]
            try:
                for done in as_completed(work):
                    journal.add(found := done.result())
                    progress.update(len(found))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _workers(self) -> Executor:
        """Return what forces documents side by side: processes, or a thread of this one where there is one job."""
        if self.jobs == 1:
            return ThreadPoolExecutor(1, "", start_worker, (str(self.model), torch.get_num_threads()))
        return ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), start_worker, (str(self.model), 1))

    def _write_samples(self, prompts: dict[str, list[int]], eos: int) -> None:
        journal = Journal(self.out / "samples.jsonl")
        known = {document.name for document in self.samples(prompts)}
        missing = [name for name in prompts if name not in known]
        if not missing:
            return
        network = Network(self.model)
        for start in tqdm(range(0, len(missing), SAMPLED_TOGETHER), desc="sampling", file=sys.stderr):
            names = missing[start : start + SAMPLED_TOGETHER]
            replies = network.sample([prompts[name] for name in names], self.experiment.tokens, eos)
            journal.add([{"name": name, "reply": reply} for name, reply in zip(names, replies, strict=True)])


_network: Network | None = None


def start_worker(model: str, threads: int) -> None:
    """Load the model, once a process."""
    global _network
    torch.set_num_threads(threads)
    _network = Network(Path(model))


def force(document: Document, arms: dict[str, EvictionConfig], out: str) -> list[dict[str, Any]]:
    """Force one document under arms and keep its steps; returns when each arm had rounds, in steps."""
    assert _network is not None
    found = []
    for arm, steps, rounds in forced(_network, document, arms):
        keep(Path(out) / arm / f"{document.name}.npy", steps)
        found.append({"arm": arm, "name": document.name, "rounds": rounds})
    return found


def forced(
    network: Network, document: Document, arms: dict[str, EvictionConfig]
) -> Iterator[tuple[str, NDArray[np.float32], list[int]]]:
    """Yield each arm's steps on a document, ``processor.MEASURES`` as float32 ``[T, 4]``, and those behind a round."""
    until = {config.budget.tokens + 2 * config.rounds.interval for config in arms.values()}
    known = min(len(document.prompt) + max(until), len(document.prompt) + len(document.reply))
    shares = {arm: budgets(config, network.layers) for arm, config in arms.items()}
    with torch.inference_mode():
        whole = full(network, document.prompt, document.reply, known)
        replays = [Replay(network, config, shares[arm], whole) for arm, config in arms.items()]
        found = measured(document.reply, whole, replays)
    for arm, steps, replay in zip(arms, found, replays, strict=True):
        yield arm, steps, [length + 1 - whole.prompt for length in replay.rounds]


def budgets(config: EvictionConfig, layers: int) -> tuple[int, ...]:
    """Return k_l of an arm.

    Raises
    ------
    ConfigError
        If its prompt is not kept, as how a private prompt's scores begin is the server's; or if its budgets or its
        profile are not of a model of so many layers.
    """
    if config.retain.prompt != "keep":
        raise ConfigError("retain.prompt: got evict, which is measured on a server only; set it to keep")
    profile = profiles.load(Path(config.budget.profile)) if config.budget.reads_profile else None
    return from_config(config, layers, profile)


def measured(reply: Sequence[int], whole: Full, replays: Sequence[Replay]) -> list[NDArray[np.float32]]:
    """Run replays side by side, and compare each with the full cache, which their steps before a round are those of."""
    chosen, likely, first = torch.tensor(reply).unsqueeze(1), whole.logits.exp(), whole.logits.argmax(-1)
    nll = -whole.logits.gather(1, chosen).squeeze(1)
    steps = torch.stack((torch.zeros(len(reply)), torch.ones(len(reply)), nll, nll), dim=1).repeat(len(replays), 1, 1)
    for which, position, logits in together(replays[0].network, replays):
        start = position - whole.prompt + 1  # the step whose distribution is behind that token
        of, part = slice(start, start + len(logits)), steps[which, start : start + len(logits)]
        part[:, KL] = (likely[of] * (whole.logits[of] - logits)).sum(-1)
        part[:, AGREEMENT] = (first[of] == logits.argmax(-1)).float()
        part[:, NLL] = -logits.gather(1, chosen[of]).squeeze(1)
    found: list[NDArray[np.float32]] = list(steps.numpy())
    return found
