"""Accuracy against memory on live servers: ``lethe eval``."""
