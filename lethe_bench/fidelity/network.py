"""A language model on Hugging Face transformers whose attention somebody else computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lethe_sglang.config import ConfigError

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""From a layer's number, its queries ``[Hq, C, D]``, keys and values ``[Hkv, C, D]`` (positions applied) and the
softmax scale to its output, ``[C, Hq, D]``."""

NAME = "lethe_replay"


class Part(NamedTuple):
    """Tokens at positions from ``start`` on, who attends, and which are asked for what comes next.

    Attributes
    ----------
    tokens
        Token ids.
    start
        Position of the first.
    attend
        Computes their attention.
    first, last
        Log-probabilities are computed behind tokens ``first`` to before ``last``; None is the end.
    """

    tokens: Sequence[int]
    start: int
    attend: Attend
    first: int = 0
    last: int | None = None


UNKNOWN = ("sliding_window", "softcap", "s_aux")
"""What models hand attention beside query, key and value, and a replay does not compute."""


class Network:
    """A causal model in float32, whatever its weights are stored as."""

    def __init__(self, path: Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(NAME, self._attention)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=NAME)
        self.model.eval()
        self._parts: Sequence[Part] = ()

    @property
    def layers(self) -> int:
        """L."""
        return int(self.model.config.num_hidden_layers)

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if used := [name for name in UNKNOWN if kwargs.get(name) is not None]:
            raise ConfigError(f"--in-process: layer {module.layer_idx} uses {', '.join(used)}; measure on a server")
        outputs, end = [], 0
        for part in self._parts:
            own = slice(end, end := end + len(part.tokens))
            q, k, v = query[0, :, own], key[0, :, own], value[0, :, own]
            outputs.append(part.attend(module.layer_idx, q, k, v, kwargs["scaling"]))
        return torch.cat(outputs).unsqueeze(0), None

    def forward(self, *parts: Part) -> list[torch.Tensor]:
        """Run parts that do not know of each other, of whatever lengths, in one pass: larger products, same numbers.

        Returns
        -------
        list of torch.Tensor
            Of each part its log-probabilities, float32 ``[n, V]``, in nats.
        """
        self._parts = parts
        ids = torch.tensor([[token for part in parts for token in part.tokens]])
        places = torch.cat([torch.arange(part.start, part.start + len(part.tokens)) for part in parts]).unsqueeze(0)
        asked = [torch.arange(len(part.tokens))[part.first : part.last] for part in parts]
        starts = [0, *accumulate(len(part.tokens) for part in parts)]
        with torch.inference_mode():
            keep = torch.cat([start + some for start, some in zip(starts, asked, strict=False)])
            said = self.model(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=keep)
            logits = said.logits[0].float().split([len(some) for some in asked])
            return [some.log_softmax(-1) for some in logits]

    def sample(
        self, prompts: Sequence[Sequence[int]], tokens: int, eos: int, temperature: float = 0.8
    ) -> list[list[int]]:
        """Let the model write a reply of its own to each prompt, with the full cache, all of one length."""
        width = max(map(len, prompts))
        ids = torch.tensor([[eos] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        torch.manual_seed(sum(map(sum, prompts)))
        self.model.set_attn_implementation("sdpa")
        try:
            written = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=eos,
            )
        finally:
            self.model.set_attn_implementation(NAME)
        replies: list[list[int]] = written[:, width:].tolist()
        return replies
