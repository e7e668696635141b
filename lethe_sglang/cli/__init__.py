"""The `lethe` program."""
