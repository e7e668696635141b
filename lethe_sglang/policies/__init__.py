"""What to keep: one file per policy."""

from lethe_sglang.policies.base import Accumulation, Candidates, Policy
from lethe_sglang.policies.registry import POLICIES, build_policy, policy_names

__all__ = ["POLICIES", "Accumulation", "Candidates", "Policy", "build_policy", "policy_names"]
