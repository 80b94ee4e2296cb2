"""Models: their files, how they are loaded and saved, and the pass that gives log-probs."""
