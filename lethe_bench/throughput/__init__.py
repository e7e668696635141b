"""Throughput and memory against stock SGLang at the same KV pool: ``lethe bench``."""
