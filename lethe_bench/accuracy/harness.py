"""EleutherAI's lm-evaluation-harness against a running server, through its own clients of the OpenAI endpoints.

Only tasks that generate say something about eviction: likelihoods need a prefill and no decode step.
"""

from __future__ import annotations

import importlib
import json
import os
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lethe_sglang.config import ConfigError
from lethe_sglang.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class HarnessPlan:
    """What to ask the harness for.

    Attributes
    ----------
    url
        Address of the server, without a path.
    tasks
        Names of the harness's tasks, or of its task files.
    model
        Name that the server serves; None asks the server.
    tokenizer
        Local directory of the tokenizer, for tasks that count tokens; None sends text.
    chat
        Whether to use ``/v1/chat/completions``, where the server applies the chat template.
    concurrency, limit, fewshot, max_new_tokens
        Requests at a time, problems per task, examples in the prompt, longest reply; None is the task's own.
    """

    url: str
    tasks: tuple[str, ...]
    model: str | None = None
    tokenizer: str | None = None
    chat: bool = False
    concurrency: int = 8
    limit: int | None = None
    fewshot: int | None = None
    max_new_tokens: int | None = None

    def arguments(self, model: str) -> dict[str, Any]:
        """Return the arguments of ``lm_eval.simple_evaluate``."""
        path = "chat/completions" if self.chat else "completions"
        client: dict[str, Any] = {
            "model": model,
            "base_url": f"{self.url.rstrip('/')}/v1/{path}",
            "num_concurrent": self.concurrency,
            "tokenizer_backend": "none" if self.tokenizer is None else "huggingface",
            "tokenized_requests": False,
            "max_retries": 1,
            "timeout": 14400,
        }
        if self.tokenizer is not None:
            client["tokenizer"] = self.tokenizer
        if self.max_new_tokens is not None:
            client["max_gen_toks"] = self.max_new_tokens
        chosen: dict[str, Any] = {
            "model": "local-chat-completions" if self.chat else "local-completions",
            "model_args": client,
            "tasks": list(self.tasks),
            "limit": self.limit,
            "num_fewshot": self.fewshot,
            "apply_chat_template": self.chat,
            "batch_size": 1,
        }
        if self.max_new_tokens is not None:
            chosen["gen_kwargs"] = {"max_gen_toks": self.max_new_tokens}
        return chosen


def run(plan: HarnessPlan, directory: Path) -> dict[str, dict[str, Any]]:
    """Run the harness and write ``lm-eval.json`` (results) and ``lm-eval-samples.jsonl`` into a directory.

    Data sets come from the local cache of Hugging Face alone, unless ``HF_HUB_OFFLINE=0`` is set.

    Returns
    -------
    dict
        Task -> metric -> value.

    Raises
    ------
    ConfigError
        If the server does not answer, or the harness refuses a task.
    ModuleNotFoundError
        If the harness is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    evaluate = importlib.import_module("lm_eval").simple_evaluate  # imports the rest of it
    info = _ask(plan.url, "/server_info")
    arguments = plan.arguments(plan.model or str(_ask(plan.url, "/v1/models")["data"][0]["id"]))
    try:
        found = evaluate(**arguments)
    except (KeyError, ValueError, OSError) as error:  # what the harness raises for tasks and data it cannot find
        raise ConfigError(f"lm-eval --tasks {','.join(plan.tasks)}: {error}; see: lm_eval ls tasks") from None
    state = info["internal_states"][0].get("lethe") if info.get("internal_states") else None
    eviction = None if state is None else {key: state.get(key) for key in ("policy", "budget_tokens", "interval")}
    samples = found.pop("samples", {})
    page = {"plan": asdict(plan), "eviction": eviction, **found}
    write_atomically(directory / "lm-eval.json", json.dumps(page, indent=1, default=str) + "\n")
    lines = [json.dumps({"task": task, **line}, default=str) for task, kept in samples.items() for line in kept]
    write_atomically(directory / "lm-eval-samples.jsonl", "".join(f"{line}\n" for line in lines))
    return dict(found["results"])


def _ask(url: str, path: str) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}{path}", timeout=60) as reply:
            return dict(json.load(reply))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--url {url}: no SGLang server answers there ({error}); give http://HOST:PORT") from None
