"""What to keep: one file per policy."""

from lethe_sglang.policies.base import Accumulation, Candidates, Policy
from lethe_sglang.policies.registry import policy_class, policy_names

__all__ = ["Accumulation", "Candidates", "Policy", "policy_class", "policy_names"]
