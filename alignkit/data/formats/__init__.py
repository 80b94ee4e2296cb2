"""How conversations of other programs are written: one file a format, found by its name."""
