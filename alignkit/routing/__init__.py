"""The bank of routings that a mixture of experts is aligned with: who routed well, who is alike, and what follows."""
