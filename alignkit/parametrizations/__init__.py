"""Which numbers may move: full fine-tuning, LoRA, quantised bases."""
