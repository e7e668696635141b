"""The files of a suite that take longest begin first, so that two workers end together."""

from __future__ import annotations

LONGEST = (
    "test_state_machine",
    "test_replay",
    "test_reasoner",
    "test_program",
    "test_phase",
    "test_serving",
    "test_cuda_graphs",
    "test_neighbours",
    "test_kits",
    "test_pressure",
    "test_cuda_backends",
    "test_docs",
    "test_replicas",
    "test_profile",
    "test_quickstart",
    "test_fidelity",
    "test_reconfigure",
    "test_shares",
    "test_rounds",
    "test_flashattention_backend",
    "test_triton_backend",
    "test_flashinfer_backend",
    "test_triton_rounds",
    "test_triton_compiles",
    "test_triton_places",
    "test_triton_select",
    "test_counts",
)
"""Files of all suites; a name may stand for one in two of them."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist: it would begin with the files that have the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
