"""Comparison with kvpress, in an environment of its own (``compare.sh``)."""
