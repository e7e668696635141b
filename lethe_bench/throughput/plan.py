"""What a benchmark runs: its knobs, its arms, and the command lines of its servers and of its client.

========  =============================================================================================
stock     SGLang without an eviction flag
idle      the plugin with a budget that no request reaches: its attention and bookkeeping, but no round
lethe     the plugin with the configuration that was asked for
always    the same with ``rounds.when: always``
pressure  the same with ``rounds.when: pressure``
========  =============================================================================================
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lethe_bench.machine import model_name, readable
from lethe_bench.servers import HOST, launch_command
from lethe_sglang.config import ConfigError, EvictionConfig, from_mapping

ARMS = ("stock", "idle", "lethe")


@dataclass(frozen=True, kw_only=True)
class Arms:
    """What the servers of a benchmark are given, arm by arm.

    Attributes
    ----------
    legal_arms
        The arms that this benchmark has.
    model_path
        Directory or Hugging Face name of the model.
    config
        What the evicting arms run; the others' are derived from it.
    input_len, output_len
        Tokens of every prompt and of every answer.
    max_total_tokens, page_size
        The KV pool of every arm, in tokens; None leaves the page size to SGLang.
    repeats, arms
        How often each arm is measured, and which arms.
    port
        Where the servers listen, on 127.0.0.1.
    server_args
        More arguments of every server.
    timeout
        Longest measurement, in seconds, the server's start not counted.
    seed
        Seed of the prompts.
    """

    legal_arms: ClassVar[tuple[str, ...]] = ARMS

    model_path: str
    config: EvictionConfig
    input_len: int = 64
    output_len: int = 1024
    max_total_tokens: int = 4096
    page_size: int | None = None
    repeats: int = 3
    arms: tuple[str, ...] = ARMS
    port: int = 31000
    server_args: tuple[str, ...] = ()
    timeout: float = 3600
    seed: int = 1

    @property
    def model_name(self) -> str:
        """The model without the directories above it."""
        return model_name(self.model_path)

    @property
    def warmup_tokens(self) -> int:
        """Tokens of the request that warms a server up: enough for a round by its own length."""
        return min(self.output_len, max(32, self.first_round - self.prunable_prompt + self.config.rounds.interval))

    @property
    def prunable_prompt(self) -> int:
        """Prompt tokens that may be evicted."""
        return self.input_len if self.config.retain.prompt == "evict" else 0

    @property
    def first_round(self) -> int:
        """Evictable tokens at which a request's first round by its length is due, if all layers are alike."""
        page = self.page_size or 1
        leaving = max(self.config.rounds.interval, self.config.scored + 1)
        return self.config.recent + -(-leaving // page) * page

    def check(self) -> None:
        """Refuse a plan whose arms could not serve the workload or would not differ.

        Raises
        ------
        ConfigError
            With one line that names the option and a legal value.
        """
        if self.config.policy == "none":
            raise ConfigError("--policy none: is the stock arm; give an eviction policy, such as --policy lethe")
        if unknown := [arm for arm in self.arms if arm not in self.legal_arms]:
            raise ConfigError(f"--arms: unknown arm {unknown[0]!r}; give one or more of {','.join(self.legal_arms)}")
        if len(set(self.arms)) < len(self.arms) or not self.arms:
            legal = ",".join(self.legal_arms)
            raise ConfigError(f"--arms {','.join(self.arms)}: give each arm at most once, as in {legal}")
        page = self.page_size or 1
        smallest = -(-(self.input_len + self.output_len + 2) // page) * page + page
        if self.max_total_tokens < smallest:
            raise ConfigError(
                f"--max-total-tokens {self.max_total_tokens}: cannot hold one request of {self.input_len} + "
                f"{self.output_len} tokens without eviction, as the stock arm must; give at least {smallest}"
            )
        length = self.prunable_prompt + self.output_len
        if not {"stock", "idle"}.issuperset(self.arms) and length <= self.first_round:
            raise ConfigError(
                f"--budget {self.config.budget.tokens} with --interval {self.config.rounds.interval}: a request's "
                f"first round is due at {self.first_round} evictable tokens and a request has {length}, so nothing "
                "would be evicted; give smaller ones, or "
                f"--output-len {self.first_round - self.prunable_prompt + self.config.rounds.interval} or more"
            )

    def arm_config(self, arm: str) -> EvictionConfig | None:
        """Return the eviction configuration of an arm, None for stock."""
        if arm == "stock":
            return None
        if arm == "idle":
            return never_due(self.config, self.input_len + self.output_len)
        return self.config if arm == "lethe" else due(self.config, arm)

    def server_command(self, arm: str) -> list[str]:
        """Command line of an arm's server."""
        own = ("--max-total-tokens", str(self.max_total_tokens), "--decode-log-interval", "1", *self.server_args)
        command = launch_command(self.model_path, self.port, *own)
        if self.page_size is not None:
            command += ["--page-size", str(self.page_size)]
        if (config := self.arm_config(arm)) is not None:
            command += ["--kv-evict", config.policy, "--kv-evict-config", config.model_dump_json()]
        return command

    def readable(self, command: Iterable[str]) -> list[str]:
        """Return a command line without the paths of this machine."""
        return readable(command, self.model_path)


@dataclass(frozen=True, kw_only=True)
class Plan(Arms):
    """All knobs of ``lethe bench``.

    Attributes
    ----------
    requests, concurrency
        Requests of one measurement, and how many the client keeps open at a time.
    """

    requests: int = 32
    concurrency: int = 32

    def client_command(self, output: Path) -> list[str]:
        """Command line of SGLang's own client.

        Prompts travel as token ids, so that their length is exact; special tokens are not dropped from the answers,
        because the client takes an answer's first text for its first token. The server is warm already.
        """
        sampling = {"temperature": 0, "max_new_tokens": self.output_len, "ignore_eos": True}
        body = {"sampling_params": sampling | {"skip_special_tokens": False}}
        return [
            sys.executable,
            "-m",
            "sglang.benchmark.serving",
            "--backend",
            "sglang",
            "--base-url",
            f"http://{HOST}:{self.port}",
            "--model",
            self.model_path,
            "--tokenizer",
            self.model_path,
            "--dataset-name",
            "random-ids",
            "--tokenize-prompt",
            "--random-input-len",
            str(self.input_len),
            "--random-output-len",
            str(self.output_len),
            "--random-range-ratio",
            "1.0",
            "--num-prompts",
            str(self.requests),
            "--max-concurrency",
            str(self.concurrency),
            "--request-rate",
            "inf",
            "--seed",
            str(self.seed),
            "--warmup-requests",
            "0",
            "--disable-tqdm",
            "--output-details",
            "--extra-request-body",
            json.dumps(body),
            "--output-file",
            str(output),
        ]


def due(config: EvictionConfig, when: str) -> EvictionConfig:
    """Return ``config`` with rounds ``always`` or under ``pressure``."""
    data = config.model_dump(mode="json")
    data["rounds"]["when"] = when
    return from_mapping(data, where=f"the configuration of the arm {when}")


def never_due(config: EvictionConfig, length: int) -> EvictionConfig:
    """Return ``config`` with a budget that a request of ``length`` tokens never reaches."""
    data = config.model_dump(mode="json")
    tokens = 2 * length + config.rounds.interval
    data["budget"] |= {"tokens": tokens, "allocation": "uniform", "layers": None}
    data["rounds"]["when"] = "always"
    data["requests"]["max_budget"] = None
    data["debug"]["pack_always"] = False
    return from_mapping(data, where="the idle arm's configuration")
