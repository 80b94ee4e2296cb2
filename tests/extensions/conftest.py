"""The files under ``added/`` are tests of a house that they are added to, and of none else."""

collect_ignore = ["added"]
