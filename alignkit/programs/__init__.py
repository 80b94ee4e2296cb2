"""What the programs of ``trainers/`` and ``scripts/`` share: arguments, outputs, errors."""
