"""How many tokens each layer keeps."""

from lethe_sglang.allocation.budgets import from_config, layer_budgets, scale

__all__ = ["from_config", "layer_budgets", "scale"]
