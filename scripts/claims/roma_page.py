"""What the sections of the page on RoMA share."""

from __future__ import annotations

PAGE = "roma.md"
HEADER = """\
# RoMA: routers drawn to where their neighbours succeed

What "RoMA" (arXiv 2511.07419) claims of training nothing but the routers of the last layers of a mixture of experts,
with a term that draws the routing of a prompt to that of the nearest prompts that the model gets right: its mechanism
in a toy made for it, and its use on real text with a small trained model. Neither has the size of the paper's models (7
to 30 billion parameters) or its benchmarks; nothing here reproduces or refutes its table. In the code its authors
released that term has no gradient, so there is nothing of theirs to compare with; the paper does not say its lambda,
sigma and step size.
"""
