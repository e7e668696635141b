"""Packed blocks: layout, ledger, pool and rounds."""
