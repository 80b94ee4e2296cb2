"""The programs behind ``alignkit``, and what these and those of ``trainers/`` share: arguments, outputs, errors."""
