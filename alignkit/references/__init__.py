"""References: frozen, copied, precomputed or moving, their caches, and token rewards."""
