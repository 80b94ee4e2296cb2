"""What a person reads: verdicts, plot, card, tables."""
