"""The matrix every policy enters: real pool, allocator, tree and scheduler; a server goes from policy to policy."""

from __future__ import annotations

from problems import CHAINS, WALKS

from lethe_sglang.policies import policy_names

POLICIES = policy_names()
SHORT = {"budget": {"tokens": 16}, "rounds": {"interval": 8}}
"""Many rounds in few tokens."""


def switch(server, policy: str) -> None:
    """Send an idle server over to a policy."""
    server.flush()
    answer = server.post("/kv_evict", {"policy": policy, **SHORT})
    assert answer["configuration"]["policy"] == server.lethe()["policy"] == policy


def run(server, policy: str) -> None:
    """Many rounds alone, together and through a retraction; nothing may leak and no output may depend on the batch."""
    prompts = [WALKS[0], CHAINS[1]]
    work = dict(tokens=42, ignore_eos=True)
    switch(server, policy)
    alone = server.generate(prompts[0], **work)["text"]
    last = server.lethe()["last_finished"]
    assert last["rounds"] >= 3 and min(last["evicted_per_layer"]) >= 16
    assert server.generate_all(prompts, 2, **work)[0]["text"] == alone
    checks = server.lethe()["shadow"]["checks"]

    server.retracted(prompts, tokens=40, ignore_eos=True)
    assert server.lethe()["shadow"]["checks"] > checks
    server.check_healthy()
