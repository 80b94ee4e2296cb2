"""What the configurations of all programs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.config.check import validate_config
from alignkit.config.method_value import known_method
from alignkit.data.columns import RowFamily
from alignkit.parts.method import load_method
from alignkit.parts.rule import load_rule, rule_names


@dataclass(frozen=True, kw_only=True)
class ProgramConfig:
    """Everything a run of one program depends on; a subclass lists its sections beside this class.

    The keys are those of the config files. ``method_options`` holds the method's own, as an instance of its options
    class, and ``gradient_options`` those of the gradient rule, if there is one; left out, they take their defaults.
    Nothing is checked on construction: :meth:`validate` reports all problems at once.
    """

    program: ClassVar[str]
    gives_rewards: ClassVar[bool] = False
    """Whether what is trained gives a whole answer a number, and no next-token probabilities."""

    method: str
    method_options: Any = None
    gradient_rule: str | None = None
    gradient_options: Any = None

    def __post_init__(self) -> None:
        if (method := known_method(self.program, self.method)) is not None:
            object.__setattr__(self, "method", method)
        if self.method_options is None and method is not None:
            object.__setattr__(self, "method_options", load_method(self.method).options())
        if self.gradient_options is None and self.gradient_rule in rule_names():
            object.__setattr__(self, "gradient_options", load_rule(self.gradient_rule).options())

    @staticmethod
    def row_family(values: Mapping[str, Any]) -> RowFamily:
        """What rows may look like under these values; keys with a problem of their own are absent."""
        raise NotImplementedError

    def validate(self) -> None:
        """Check every value, every combination, and the files named here.

        Raises:
            ConfigError: Lists all problems.
        """
        validate_config(self)
