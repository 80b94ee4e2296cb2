"""Batch shapes: one bridge to a Hugging Face trainer each."""
