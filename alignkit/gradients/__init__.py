"""Gradient rules: what is done to the gradient before the optimizer sees it. One file a rule; its name registers it."""
