"""``debug.fingerprints``: ranks that keep different tokens stop the server instead of drifting apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lethe_sglang.config import from_mapping

runtime_module = pytest.importorskip("lethe_sglang.engine.runtime")


@pytest.fixture
def record(monkeypatch):
    """Record one round on rank 0 of two, the other of which has kept ``theirs`` in layer 1."""

    def run(theirs):
        ranks = []
        for positions in ([3, 5, 4, 6], [3, 5, *theirs]):
            runtime = runtime_module.Runtime(
                from_mapping({"debug": {"fingerprints": True}}), ((1024,) * 2,), 2, 1, 4096
            )
            runtime.tp_size, runtime.req_to_token = 2, torch.zeros(1, 1)
            ranks.append((runtime, SimpleNamespace(kept_position=torch.tensor(positions))))

        def gather(parts, mine, group):
            parts[0].copy_(mine)
            parts[1].copy_(torch.tensor(list(ranks[1][0].counters.fingerprint.digest()[:8]), dtype=torch.uint8))

        monkeypatch.setattr(torch.distributed, "all_gather", gather)
        state, plan = SimpleNamespace(rid="r", rounds=1), SimpleNamespace(kept=(2, 2), new_tail=9, prefix=0)
        with monkeypatch.context() as patch:
            patch.setattr(runtime_module.Runtime, "_compare_ranks", lambda self, digest: None)
            ranks[1][0]._record([state], [plan], ranks[1][1])
        ranks[0][0]._record([state], [plan], ranks[0][1])

    return run


def test_ranks_that_agree_go_on(record):
    record([4, 6])


def test_ranks_that_differ_stop_and_name_their_fingerprints(record):
    with pytest.raises(
        RuntimeError, match=r"ranks kept different tokens in launch 0: fingerprints (\w{16}), (?!\1)\w{16}"
    ):
        record([4, 7])
