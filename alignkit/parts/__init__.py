"""What the parts of a run are: options, methods, gradient rules. The standard library alone."""
