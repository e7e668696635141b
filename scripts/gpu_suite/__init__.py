"""The GPU suite, run by scripts/gpu_suite.sh: one module a part, its records in JSON, goals and report over them.

=========  ===========================================================================================
results    records of a part on disk, and what a run says of itself
base       what a part is; the jobs it consists of
slots      a part's time, and what became of a server that did not do in it what it should
models     shapes of the models that the parts are about
grid       points at which kernels are timed
floors     bytes that each point must move at least
launches   the kernels themselves, set up at a point
timing     time of a launch, and of a copy of as many bytes
kernels    part: tests/kernels on the device
micro      part: each kernel over the grid
server     part: whole servers, dummy weights
waits      what makes the host wait in a trace of decode steps
trace      part: waits of decode steps against stock's
settings   servers whose greedy output is compared, and the pairs of their passes
replies    greedy replies of one server
greedy     part: greedy output with and without CUDA graphs and overlap, and over concurrencies
goals      goals and the figures that they are judged by
report     the page
__main__   command line
=========  ===========================================================================================

Only launches and timing import PyTorch; whatever is imported from lethe_sglang elsewhere is imported where it is used,
so that a dry run and the report need neither.
"""
