"""Objectives as pure functions of log-probs: torch alone, one file per objective."""
