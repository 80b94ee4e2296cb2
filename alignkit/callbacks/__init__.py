"""Trainer callbacks: health verdicts, run records, checkpoints, probe."""
