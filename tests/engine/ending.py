"""Ending a server while it answers."""

from __future__ import annotations

from lethe_bench.soak import ends

BODY = {"text": "a=1;b=2;?a", "sampling_params": {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}}
"""A request that takes seconds."""


def under_load(server, monkeypatch, end) -> tuple[str, int | None]:
    """End a server that answers four requests; returns what became of its processes, and the launcher's status."""
    monkeypatch.setattr(ends, "LOADED_SECONDS", 0.7)
    launcher = server._process  # the server forgets it once it is stopped
    return ends.ended_under_load(server, [BODY] * 4, end), launcher.poll()
