"""Which methods are run with which gradient rules and parametrisations: the one list of them.

``test_compositions.py`` runs every entry, and ``scripts/docs.py`` writes the matrix in docs/concepts/compatibility.md
from it. A new method or rule joins by itself. Torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from alignkit.config.compatibility import REFUSALS as CONFLICTS
from alignkit.config.refusals import Refusal
from alignkit.parts.method import load_method, method_names
from alignkit.parts.rule import EditOptions, load_rule, rule_names
from tests.alike import stands_for_others

RELATIVES = (
    *("alphapo", "cpo", "orpo", "simpo"),  # without a reference
    *("aot", "aot_unpaired", "apo_down", "apo_zero", "bco_pair", "discopop", "exo_pair", "hinge", "ipo", "nca_pair"),
    *("robust", "sigmoid_norm", "sppo_hard"),  # of TRL's family
    *("kto", "lipo", "pro", "dft"),
    *("bradley_terry", "plackett_luce", "process_reward", "mr_rml"),
)
"""Losses that are one more formula over a batch that another of them has: tests/shapes/loss_table.py tries each under a
rule. All others are tried under every rule."""
METHODS = [name for name in method_names() if name not in RELATIVES]
RULES = rule_names()
PARAMETRIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "full": {"parametrization": "full"},
    "LoRA": {},
    "QLoRA": {"quantization": "nf4"},
    "routers": {"parametrization": "routers"},
}
"""What a config says for each; LoRA is the default but for router training."""
IN_FULL = ("flex_dpo", "sft")
ON_QLORA = ("glad", "perpgrad")
OF_ROUTERS = ("dpo", "flex_dpo", "grpo", "roma", "sft")
WITHOUT_FACTORS = "gradient rule on LoRA with full fine-tuning"
"""Title of the row of docs/concepts/compatibility.md that refuses a rule of LoRA factors where there are none."""


@dataclass(frozen=True)
class Composition:
    """A run that is tried, or refused.

    Attributes:
        method: Value of the key ``method``.
        rule: Value of the key ``gradient_rule``.
        parametrization: Key of :data:`PARAMETRIZATIONS`.
        keys: Further keys it takes.
        refused: Title of the conflict that refuses it, None where it trains.
    """

    method: str
    rule: str
    parametrization: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The keys that make it this composition."""
        parametrization = PARAMETRIZATIONS[self.parametrization]
        if "parametrization" not in parametrization and program(self) == "router":
            parametrization = {"parametrization": "lora", **parametrization}
        return {"method": self.method, "gradient_rule": self.rule, **parametrization, **self.keys}

    @property
    def label(self) -> str:
        """What a cell of the matrix says of it."""
        keys = ", ".join(f"`{key}: {value}`" for key, value in self.keys.items())
        return f"{self.parametrization} with {keys}" if keys else self.parametrization

    def __str__(self) -> str:
        """Name of the test."""
        return "-".join([self.method, self.rule, self.parametrization, *map(str, self.keys.values())])


def _without_factors(method: str, rule: str, parametrization: str) -> list[Composition]:
    """A rule that by default edits LoRA factors alone is refused where there are none, until told otherwise."""
    options = load_rule(rule).options()
    if not isinstance(options, EditOptions) or options.rule_targets == "all":
        return [Composition(method, rule, parametrization)]
    every_tensor = Composition(method, rule, parametrization, {"rule_targets": "all"})
    return [every_tensor, Composition(method, rule, parametrization, refused=WITHOUT_FACTORS)]


def rules_of(method: str) -> list[str]:
    """Rules that a method is tried with on LoRA: all of them, or one where another method that runs alike has all."""
    return RULES if stands_for_others(method) else [RULES[METHODS.index(method) % len(RULES)]]


ALL: tuple[Composition, ...] = (
    *(composition for pair in product(IN_FULL, RULES) for composition in _without_factors(*pair, "full")),
    *(Composition(method, rule, "LoRA") for method in METHODS for rule in rules_of(method)),
    *(Composition(method, rule, "QLoRA") for method, rule in product(METHODS, ON_QLORA) if rules_of(method) == RULES),
    *(composition for pair in product(OF_ROUTERS, ON_QLORA) for composition in _without_factors(*pair, "routers")),
)
TRAINED = [composition for composition in ALL if composition.refused is None]
REFUSED = [composition for composition in ALL if composition.refused is not None]


def matrix() -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row a gradient rule, a column a method, in a cell what was tried."""
    cells: dict[tuple[str, str], list[str]] = {}
    for composition in TRAINED:
        cells.setdefault((composition.rule, composition.method), []).append(composition.label)
    rows = [[f"`{rule}`", *("; ".join(cells.get((rule, method), ["-"])) for method in METHODS)] for rule in RULES]
    return ["", *(f"`{method}`" for method in METHODS)], rows


def refusals() -> list[str]:
    """What is refused, whatever the method, why, and what to write instead: lines that stand under the matrix."""
    lines = []
    for composition in REFUSED:
        conflict = conflict_of(composition)
        keys = PARAMETRIZATIONS[composition.parametrization].items()
        what = " ".join(f"`{key}: {value}`" for key, value in [("gradient_rule", composition.rule), *keys])
        lines.append(f"Refused: {what}. Why: {conflict.why}. {conflict.fix}.")
    return list(dict.fromkeys(lines))


def conflict_of(composition: Composition) -> Refusal:
    """The conflict that refuses a composition."""
    (conflict,) = [conflict for conflict in CONFLICTS if conflict.title == composition.refused]
    return conflict


def program(composition: Composition) -> str:
    """The program that runs it."""
    return load_method(composition.method).program
