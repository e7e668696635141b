"""A language model on Hugging Face transformers whose attention somebody else computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lethe_sglang.config import ConfigError

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""From a layer's number, its queries ``[Hq, C, D]``, keys and values ``[Hkv, C, D]`` (positions applied) and the
softmax scale to its output, ``[C, Hq, D]``."""

NAME = "lethe_replay"


UNKNOWN = ("sliding_window", "softcap", "s_aux")
"""What models hand attention beside query, key and value, and a replay does not compute."""


class Network:
    """A causal model in float32, whatever its weights are stored as."""

    def __init__(self, path: Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(NAME, self._attention)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=NAME)
        self.model.eval()
        self._attend: Attend | None = None

    @property
    def layers(self) -> int:
        """L."""
        return int(self.model.config.num_hidden_layers)

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        assert self._attend is not None
        if used := [name for name in UNKNOWN if kwargs.get(name) is not None]:
            raise ConfigError(f"--in-process: layer {module.layer_idx} uses {', '.join(used)}; measure on a server")
        return self._attend(module.layer_idx, query[0], key[0], value[0], kwargs["scaling"]).unsqueeze(0), None

    def forward(
        self, tokens: Sequence[int], start: int, attend: Attend, first: int = 0, last: int | None = None
    ) -> torch.Tensor:
        """Run tokens at positions from ``start`` on; return log-probabilities behind ``first`` to ``last``.

        Returns
        -------
        torch.Tensor
            float32 ``[n, V]``, in nats.
        """
        self._attend = attend
        ids = torch.tensor([tokens])
        places = torch.arange(start, start + len(tokens)).unsqueeze(0)
        with torch.inference_mode():
            asked = torch.arange(len(tokens))[first:last]
            said = self.model(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=asked)
            logits: torch.Tensor = said.logits[0].float().log_softmax(-1)
        return logits

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
