"""Benchmarks of load: one pool under ever more requests at once, and under a burst."""
