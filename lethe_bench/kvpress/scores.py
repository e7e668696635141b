"""Scores of kvpress's methods and of our policies side by side, on the same keys and queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import kvpress
import torch
from kvpress.utils import get_prerope_query_states
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lethe_bench.kvpress.decode import SINKS, Model
from lethe_sglang.attention.prefill import observation_attention, replay
from lethe_sglang.config import from_mapping
from lethe_sglang.kernels.reference import select
from lethe_sglang.policies import Accumulation, Candidates, Policy


class Agreement(NamedTuple):
    """How a kvpress method and ours rank the tokens of a layer: largest difference over range, share of equal sets."""

    method: str
    layer: int
    difference: float
    equal: float


def layer_inputs(
    network: Any, ids: torch.Tensor
) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor, Any, dict[str, Any]]]:
    """Yield attention module, hidden states, attentions, cache and keyword arguments of each layer of one forward."""
    caught: dict[int, tuple[Any, torch.Tensor, torch.Tensor, dict[str, Any]]] = {}

    def catch(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
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


def ours_of(name: str, **options: Any) -> Policy:
    """Return a policy of ours with some of its options."""
    return from_mapping({"policy": name, **({name: options} if options else {})}).built_policy


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
    pins = torch.tensor([pinned])
    everyone, equal = torch.ones(1, n, dtype=torch.bool), []
    for count in (n // 4, n // 2):
        kept = [select(rank.unsqueeze(0), everyone, pins, torch.tensor([count])) for rank in (theirs, ours)]
        equal.append(torch.equal(*kept))
    return Agreement(method, layer, float((theirs - ours).abs().max()) / scale, sum(equal) / len(equal))


def agreements(model: Model, ids: torch.Tensor, window: int = 16) -> list[Agreement]:
    """Rank the tokens of one text with both, in every layer."""
    found, n = [], ids.shape[1]
    for layer, (module, hidden, attentions, store, kwargs) in enumerate(layer_inputs(model.network, ids)):
        queries = get_prerope_query_states(module, hidden)
        queries = apply_rotary_pos_emb(queries, queries, *kwargs["position_embeddings"])[0][0].transpose(0, 1)
        keys, values = store.keys, store.values
        flat = keys[0].transpose(0, 1)

        def theirs(
            press: Any, attentions: Any = None, at: tuple[Any, ...] = (module, hidden, keys, values, kwargs)
        ) -> Any:
            return press.score(*at[:4], attentions, at[4])[0]

        for head, score in enumerate(theirs(kvpress.KeyDiffPress())):
            ours = our_rank(ours_of("keydiff"), flat[:, head : head + 1], None, n, n)
            found.append(compare("keydiff", layer, score, ours))
        score = theirs(kvpress.TOVAPress(), attentions).mean(0)[:-1]
        found.append(compare("tova", layer, score, our_rank(ours_of("tova"), flat, queries[-1:], n - 1, n)))
        score = theirs(kvpress.SnapKVPress(window_size=window)).mean(0)[:-window] * window
        ours = our_rank(ours_of("snapkv", window=window, kernel=5), flat, queries[-window:], n - window, n)
        found.append(compare("snapkv", layer, score, ours))
        score = theirs(kvpress.ObservedAttentionPress(), attentions).mean(0) * torch.arange(n, 0, -1)
        found.append(compare("h2o", layer, score, our_rank(ours_of("h2o"), flat, queries, n, n)))
        place = our_rank(ours_of("streaming"), flat, None, n, n)
        equal = []
        for count in (n // 4, n // 2):
            score = theirs(kvpress.StreamingLLMPress((n - count + 0.5) / n, SINKS))[0]
            everyone, count = torch.ones(1, n, dtype=torch.bool), torch.tensor([int(score.sum())])
            kept = select(place.unsqueeze(0), everyone, torch.tensor([SINKS]), count)
            equal.append(torch.equal(kept[0], score > 0))
        found.append(Agreement("streaming", layer, 0.0, sum(equal) / len(equal)))
    return found
