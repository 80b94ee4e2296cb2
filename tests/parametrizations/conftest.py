"""The tiny model, its tokenizer and rows."""

from __future__ import annotations

from tests.trainers import model_path, rows, tokenizer

__all__ = ["model_path", "rows", "tokenizer"]
