"""What a gradient rule is: options, an edit of the gradient, perhaps a place for a second one, and its paper.

Torch is not imported here, so that configs can be checked and ``--help`` answered in a fraction of a second. A rule
module imports its maths (``_family.py``) inside its functions for the same reason. The trainers apply a rule through
``_hook.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from alignkit.parts.discovery import load_part, names_in
from alignkit.parts.method import Paper
from alignkit.parts.options import option
from alignkit.parts.parametrization import parametrizations

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.gradients._family import Evaluation

TWO_GRADIENT_METRICS: Mapping[str, str] = {
    "gradient/cosine": "cosine of the gradient and the displaced gradient, over all edited tensors together",
    "gradient/conflict_rate": "share of the edited tensors whose two gradients have a negative inner product",
    "gradient/displacement_norm": "length of the displacement that survives rounding; below rho, rounding has "
    "swallowed part of it",
    "gradient/weight_norm": "l2 norm of the edited weights, to compare the displacement with",
    "gradient/sharpness_gap": "mean loss of a micro-batch at the displaced weights minus that at the weights",
}
"""What every rule with a second gradient logs, as means over micro-batches and ranks."""


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """Options of every rule that edits gradients."""

    rule_targets: str = option(
        "all",
        choices=("all", *(record.name for record in parametrizations() if record.has_factors)),
        help="Tensors the gradient rule displaces and edits: everything that trains, or the LoRA factors alone.",
    )


@dataclass(frozen=True, kw_only=True)
class DisplacedOptions(EditOptions):
    """Options of every rule that takes a second gradient at displaced weights."""

    rho: float = option(
        0.05,
        ge=0,
        help="Length of the displacement, an l2 norm over all edited tensors together; 0 changes nothing.",
        source="SAM (arXiv 2010.01412), its reference implementations",
    )
    direction: str = option(
        "local",
        choices=("local", "global"),
        help="Whose gradients a displacement follows: each process's own micro-batch, or their mean over processes, "
        "which makes a step of one micro-batch independent of the number of processes.",
    )
    every_k: int = option(
        1, ge=1, help="Apply the rule in every k-th optimizer step only and take the plain gradient in the others."
    )
    rule_in_warmup: bool = option(
        False,
        help="Apply the rule during the warm-up of the learning rate too.",
        source="zero warm-up of github.com/zhaoyang-0204/gnp, for adaptive optimizers",
    )


@dataclass(frozen=True)
class GradientRule:
    """One gradient rule, discovered by the name of its file.

    A rule with ``displacement`` is evaluated twice: at the weights and, on the same micro-batch with the same random
    state, at the weights plus the displacement. A rule without is evaluated once. A rule with ``decay`` alone leaves
    gradients as they are and moves the weights when the optimizer steps.

    Attributes:
        name: File stem; the value of the config key ``gradient_rule``.
        summary: One sentence.
        options: Dataclass of the rule's own options; a subclass of :class:`DisplacedOptions` or :class:`EditOptions`
            where the rule edits gradients.
        paper: The publication.
        fidelity: Provenance grade, and what is ours.
        metrics: Key to meaning, for every metric that is logged.
        edit: ``(evaluations, options) -> gradients``, one a tensor: what the optimizer is given. There are two
            evaluations where the rule has a ``displacement`` and one where it has not.
        displacement: ``(evaluation, options) -> displacements``, one a tensor.
        measure: ``(evaluation, options) -> values`` by key, the metrics of a rule with one gradient.
        decay: ``options -> coefficient`` of the decoupled pull to the starting weights.
        when: When to take it: a sentence or two.
        needs_start: Whether evaluations carry the weights that training started from.
    """

    name: str
    summary: str
    options: type
    paper: Paper
    fidelity: str
    metrics: Mapping[str, str] = field(default_factory=dict)
    edit: Callable[[Sequence[Evaluation], Any], list[Tensor]] | None = None
    displacement: Callable[[Evaluation, Any], list[Tensor]] | None = None
    measure: Callable[[Evaluation, Any], Mapping[str, Tensor]] | None = None
    decay: Callable[[Any], float] | None = None
    when: str = ""
    needs_start: bool = False


def rule_names() -> list[str]:
    """Names of all rules, from the files in ``alignkit/gradients`` (helpers left out)."""
    return names_in("alignkit.gradients")


def load_rule(name: str) -> GradientRule:
    """Import and return the rule called ``name``; raises KeyError for an unknown one."""
    rule: GradientRule = load_part("alignkit.gradients", name, "RULE")
    return rule
