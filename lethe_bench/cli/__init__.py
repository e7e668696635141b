"""The laboratory's commands of the ``lethe`` program."""
