"""Observers that only tests ask for; a server finds them by the entry-point group ``lethe_sglang.observers``."""
