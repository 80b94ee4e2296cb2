"""Every kind of part that a file alone adds, in one list: what is discovered of a kind, and how one is loaded.

What says something of all parts, such as ``alignkit parts`` and the tables of the documentation, goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alignkit.parts.data_format import format_names, load_format
from alignkit.parts.evaluation import evaluation_names, load_evaluation
from alignkit.parts.method import load_method, method_names
from alignkit.parts.parametrization import load_parametrization, parametrization_names
from alignkit.parts.reward import load_reward, reward_names
from alignkit.parts.rule import load_rule, rule_names
from alignkit.parts.shape import load_shape, shape_names


@dataclass(frozen=True)
class Kind:
    """One kind of part.

    Attributes:
        title: What its parts are called, in the plural.
        folder: Where its files are, from the root of the repository.
        names: The names of all its parts.
        load: The record of one, which has a ``summary``.
        in_families: Whether a file has several of them that belong together.
    """

    title: str
    folder: str
    names: Callable[[], list[str]]
    load: Callable[[str], Any]
    in_families: bool = False

    def summaries(self) -> dict[str, str]:
        """One sentence on each of its parts, by name."""
        return {name: self.load(name).summary for name in self.names()}


KINDS = (
    Kind("methods", "alignkit/objectives", method_names, load_method),
    Kind("gradient rules", "alignkit/gradients", rule_names, load_rule),
    Kind("parametrisations", "alignkit/parametrizations", parametrization_names, load_parametrization),
    Kind("batch shapes", "alignkit/shapes", shape_names, load_shape),
    Kind("data formats", "alignkit/data/formats", format_names, load_format),
    Kind("rewards", "alignkit/rewards", reward_names, load_reward, in_families=True),
    Kind("evaluations", "alignkit/evals", evaluation_names, load_evaluation),
)
