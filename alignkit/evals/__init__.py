"""Evaluation: preference accuracy, likelihood, generation."""
