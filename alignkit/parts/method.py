"""What a method is: options with published defaults, needs, one objective and its paper.

Torch is not imported here, so that configs can be checked and ``--help`` answered in a fraction of a second. A method
module imports its loss inside the objective function for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from alignkit.parts.discovery import load_part, names_in
from alignkit.parts.mixture import MixtureError, components_of, is_mixture, mixture
from alignkit.parts.options import Conflict, Ignored

if TYPE_CHECKING:
    from alignkit.data.columns import RowFamily
    from alignkit.losses.types import LossOutput


@dataclass(frozen=True)
class Paper:
    """The publication a method implements.

    Attributes:
        title, arxiv_id, citation: Title, arXiv identifier and BibTeX entry.
    """

    title: str
    arxiv_id: str
    citation: str

    @property
    def url(self) -> str:
        """Abstract page of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv_id}"


def always(*needs: str) -> Callable[[Any], frozenset[str]]:
    """``needs`` of a method that do not depend on its options."""
    return lambda options: frozenset(needs)


@dataclass(frozen=True)
class AnchorSchedule:
    """How a reference that is no longer frozen follows the policy.

    Attributes:
        kind: ``ema``: anchor <- decay * anchor + (1 - decay) * policy after every optimizer step. ``periodic``: a copy
            of the policy every ``steps`` optimizer steps. ``kl_triggered``: a copy when the mean of ``drift_metric``
            over the last ``window`` steps exceeds ``threshold``; the window then starts anew.
        decay, steps, threshold, window: As above.
        drift_metric: Key of a metric that the objective returns.
    """

    kind: Literal["ema", "periodic", "kl_triggered"]
    decay: float = 0.99
    steps: int = 100
    threshold: float = 0.1
    window: int = 10
    drift_metric: str = ""


STARTING_MODEL = "base"
"""Name of the teacher that is the model before it was pruned, or before it was tuned."""


@dataclass(frozen=True)
class TeacherChoice:
    """Whose next-token distributions an objective is given the divergence from.

    Attributes:
        model: A folder, a Hub id or ``STARTING_MODEL``.
        temperature: What the logits of teacher and policy are divided by.
    """

    model: str
    temperature: float = 1.0


@dataclass(frozen=True)
class RewardDimensions:
    """Along what a reward model of several dimensions judges.

    Attributes:
        names: Keys of the column ``preferences``; empty is one dimension, along which chosen is better.
        width: How many numbers the head gives, at most.
    """

    names: tuple[str, ...]
    width: int


class Preparation:
    """What a method does in a run beside its loss; this one does nothing.

    A method that makes something of its rows before training, or while training, has a subclass in
    ``objectives/_<name>.py``.
    """

    exchanges_rows = False
    """Whether training rows are exchanged for others while training."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def check_launch(self) -> None:
        """Refuse what this launch cannot do; called once its processes are set up."""

    def complete(self, splits: dict[str, Any], tokenizer: Any, device: Any) -> dict[str, Any]:
        """The rows as text by the name of their split, with what they lack and the method needs; a collective."""
        return splits

    def sections(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        return {}

    def for_conversion(self, split: str) -> dict[str, Any]:
        """More arguments for the conversion of a split to tokens."""
        return {}

    def attach(self, trainer: Any, tokenizer: Any, source: Any, directory: Any) -> None:
        """Add to the trainer what works while training, and report what was made of its rows.

        Args:
            trainer: The trainer, before its first step.
            source: The training rows as text.
            directory: The run directory.
        """


def no_schedule(options: Any) -> None:
    """``anchor`` of a method whose reference, if it has one, stays what it is."""


def one_reward(options: Any) -> None:
    """``dimensions`` of a method whose model gives an answer one number, or none."""


def no_teacher(options: Any) -> None:
    """``teacher`` of a method without one."""


@dataclass(frozen=True)
class Method:
    """One training method, discovered by the name of its file.

    Attributes:
        name: File stem; the value of the config key ``method``.
        summary: One sentence.
        options: Dataclass of the method's own options, declared with :func:`alignkit.parts.options.option`.
        objective: ``(batch, options) -> LossOutput``.
        metrics: Key to meaning, for every metric the objective returns.
        paper: The publication.
        fidelity: Provenance grade: author's code, paper text, secondary source or reconstruction, and what is ours.
        program: Launch program under ``trainers/``, which also fixes the batch shape.
        needs: What the objective needs beside the policy under these options: any of ``reference``,
            ``token_rewards``, ``policy_log_sum_sq_probs`` and, of an old policy, ``old_entropies``,
            ``old_sum_sq_probs`` and ``old_policy_kl``; of completions drawn while training ``every_row`` where those
            without an advantage count; ``whole_micro_batch`` where it has a mean or a statistic within one, whose rows
            must be those drawn for it.
        num_candidates: Exact K the objective takes, or None for any K >= 2.
        row_family: What rows look like, where that is not what the rows of the batch shape look like.
        is_unpaired: Whether a row is one labelled answer, to which an answer to another prompt is put; the method then
            has the options ``desirable_weight`` and ``undesirable_weight``.
        preparation: What the method does in a run beside its loss, as a subclass of :class:`Preparation`.
        negative_reference: Name of the option with the model that scores the last candidate of a row, if any does.
        teacher: Whose distributions the policy's are compared with under these options, or None; of supervised rows.
        anchor: How the reference moves under these options, or None for one that is frozen.
        conflicts: Combinations of its options, with each other or with any key of the program, that cannot work.
        ignored: Keys without effect under this method and some values, which a user who sets them is told.
        lowers_chosen: Whether its loss makes chosen responses less likely on purpose, so that their fall is no fault.
        when: When to take it, and when another one: a sentence or two.
        dimensions: Along what a reward model judges under these options, where its head gives several numbers.
        of_candidates: The objective over the best candidate of a row, of a supervised method that can be a term of a
            preference mixture.
        mixed: The methods that this one adds up, if it is a mixture.
    """

    name: str
    summary: str
    options: type
    objective: Callable[[Any, Any], LossOutput]
    metrics: Mapping[str, str]
    paper: Paper
    fidelity: str
    program: str = "preference"
    needs: Callable[[Any], frozenset[str]] = always("reference")
    num_candidates: int | None = 2
    row_family: Callable[[], RowFamily] | None = None
    is_unpaired: bool = False
    preparation: Callable[[Any], Preparation] = Preparation
    negative_reference: str | None = None
    teacher: Callable[[Any], TeacherChoice | None] = no_teacher
    anchor: Callable[[Any], AnchorSchedule | None] = no_schedule
    conflicts: tuple[Conflict, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    lowers_chosen: bool = False
    when: str = ""
    dimensions: Callable[[Any], RewardDimensions | None] = one_reward
    of_candidates: Callable[[Any, Any], LossOutput] | None = None
    mixed: tuple[Method, ...] = ()

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods it adds up; itself alone, where it is no mixture."""
        return self.mixed or (self,)

    @property
    def is_special(self) -> bool:
        """Whether it does more in a run than its loss: has rows, models or a schedule of its own."""
        own_models = self.teacher is not no_teacher or self.anchor is not no_schedule or self.negative_reference
        own_head = self.dimensions is not one_reward
        return self.preparation is not Preparation or self.row_family is not None or bool(own_models) or own_head


MIXING = ("preference", "sft", "reward")
"""Programs whose methods can be added up: each loss is a sum over rows or tokens of the same batch."""


def method_names() -> list[str]:
    """Names of all methods, from the files in ``alignkit/objectives`` (helpers left out)."""
    return names_in("alignkit.objectives")


def load_method(name: str) -> Method:
    """Import and return the method called ``name``; raises KeyError for an unknown one.

    Args:
        name: Of a file in ``alignkit/objectives``, or the text of a mixture, such as ``1.0*ipo+0.2*sft``.
    """
    if is_mixture(name):
        return _load_mixture(name)
    method: Method = load_part("alignkit.objectives", name, "METHOD")
    return method


@cache
def _load_mixture(text: str) -> Method:
    components = components_of(text)
    named = [load_method(component.name) for component in components]
    return mixture(components, [_term(method, named) for method in named])


def _term(method: Method, named: Sequence[Method]) -> Method:
    """A method as part of a mixture: a supervised one among others is a term over the best candidate."""
    program = next((other.program for other in named if other.of_candidates is None), method.program)
    if program not in MIXING:
        raise MixtureError(f"adds up methods of `{program}` runs, whose losses keep a memory", "Name one method")
    if method.program == program:
        return method
    if method.of_candidates is None or program != "preference":
        one = f"{method.name} trains on the rows of a `{method.program}` run, and {named[0].name} does not"
        raise MixtureError(one, "Take methods of one program")
    return replace(method, program=program, objective=method.of_candidates, num_candidates=None)
