"""A model on Hugging Face transformers, and kvpress while it decodes."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Any

import kvpress
import torch
from kvpress.utils import compute_n_kept
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lethe_sglang.config import EvictionConfig, from_mapping

SINKS = EvictionConfig().retain.sinks


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
        cache, written, peak = DynamicCache(), list[int](), 0
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
class Guarded(kvpress.presses.scorer_press.ScorerPress):  # type: ignore[misc]
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
