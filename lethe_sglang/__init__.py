"""Lethe: KV eviction during decoding for reasoning models, as an SGLang plugin."""

__version__ = "0.1.0"

__all__ = ["__version__"]
