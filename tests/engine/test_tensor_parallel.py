"""Two ranks on a CPU keep the same cells."""

from __future__ import annotations

import re

from conftest import config
from problems import PROMPTS, prompt, walk


def test_both_ranks_keep_the_same_cells(start):
    settings = config(
        budget={"tokens": 48}, rounds={"interval": 16}, rasr={"half_life": 7},
        debug={"fingerprints": True, "shadow": True},
    )  # fmt: skip
    server = start(
        "--tp", "2", "--max-total-tokens", "2048", "--kv-evict", "lethe", "--kv-evict-config", settings,
    ).wait()  # fmt: skip
    problem, answer = walk(3, steps=40)
    assert server.generate(prompt(problem), tokens=300)["text"] == answer
    server.generate_all(PROMPTS[:4], 4, tokens=120)
    server.check_healthy()
    log = server.log.read_text(errors="replace")
    by_round = {}
    for rank, number, digest in re.findall(r"TP(\d)\] KV eviction: kept-set fingerprint (\d+) ([0-9a-f]+)", log):
        by_round.setdefault(int(number), {})[int(rank)] = digest
    assert len(by_round) > 10
    for number, digests in by_round.items():
        assert set(digests) == {0, 1} and digests[0] == digests[1], f"round {number}: {digests}"
