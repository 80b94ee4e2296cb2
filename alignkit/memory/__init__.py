"""How much memory a training step takes, from a model's config.json and the run's config; nothing is loaded."""
