"""Which numbers of a model may move: everything, or low-rank adapters."""
