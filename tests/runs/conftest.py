"""The tiny model and its trainers."""

from __future__ import annotations

from tests.trainers import make_trainer, model_path, rows, tokenizer

__all__ = ["make_trainer", "model_path", "rows", "tokenizer"]
