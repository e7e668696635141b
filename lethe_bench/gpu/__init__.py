"""What a GPU user runs, ``lethe gpu``: kernels against their floor, servers, host waits, replies that differ.

=========  ===========================================================================================
base       what a part is, and how one of its records comes about
results    records of a part on disk
models     shapes of the models that the parts are about
grid       points at which kernels are timed
floors     bytes that each point must move at least
launches   the kernels themselves, set up at a point
timing     time of a launch, and of a copy of as many bytes
kernels    part: each kernel over the grid
bench      part: ``lethe bench`` on cases for a GPU, dummy weights
waits      what makes the host wait in a trace of decode steps
trace      part: waits of decode steps beside stock's
settings   servers whose greedy replies are compared, and the pairs of their passes
greedy     part: greedy replies with and without CUDA graphs and overlap, and over concurrencies
report     the page
steps      decode steps of a server by its own clock
goal       a goal, measured within a limit of time, and when there is a verdict
goals      the four goals that a GPU has to confirm
=========  ===========================================================================================

Only launches and timing import PyTorch, so that a dry run and the report do not need it.
"""
