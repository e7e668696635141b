"""The Triton launchers, all in one place."""

from lethe_sglang.kernels.triton.indices import fill_lists, fill_pages
from lethe_sglang.kernels.triton.likeness import likeness
from lethe_sglang.kernels.triton.places import better_place
from lethe_sglang.kernels.triton.repack import repack
from lethe_sglang.kernels.triton.rounds import gather, place, rewrite_rows
from lethe_sglang.kernels.triton.score import schedule, score
from lethe_sglang.kernels.triton.select import select
from lethe_sglang.kernels.triton.start_states import start_states

__all__ = [
    "better_place",
    "fill_lists",
    "fill_pages",
    "gather",
    "likeness",
    "place",
    "repack",
    "rewrite_rows",
    "schedule",
    "score",
    "select",
    "start_states",
]
