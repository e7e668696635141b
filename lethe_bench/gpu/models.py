"""Shapes of the models that the parts are about; weights are SGLang's dummies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """What a kernel's bytes depend on, and what a model's config.json is made of."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    context: int
    rope_theta: float
    head_dim: int = 128
    itemsize: int = 2


MODELS = {
    "qwen2.5-7b": Shape("Qwen2ForCausalLM", 28, 28, 4, 3584, 18944, 152064, 32768, 1e6),
    "llama-3.1-8b": Shape("LlamaForCausalLM", 32, 32, 8, 4096, 14336, 128256, 131072, 5e5),
}


def write_model(folder: Path, shape: Shape) -> Path:
    """Write a model's config.json and a tokenizer of one word per token id into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": shape.architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6 if shape.architecture.startswith("Qwen") else 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if shape.architecture.startswith("Llama"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    vocabulary = {f"w{i}": i for i in range(shape.vocabulary)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    }
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w1", "unk_token": "w0"}
    for name, body in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", options)):
        (folder / f"{name}.json").write_text(json.dumps(body), encoding="utf-8")
    return folder
