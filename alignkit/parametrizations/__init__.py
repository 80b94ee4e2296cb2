"""Which numbers of a model may move, one record a file (:mod:`alignkit.parts.parametrization`)."""

DEFAULT = "lora"
"""The parametrisation of a run whose configuration names none."""
