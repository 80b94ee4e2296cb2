"""What a parametrisation is: which numbers of a model may move, with which options and which consequences.

Torch is not imported here, so that configs can be checked and ``--help`` answered in a fraction of a second. The half
that needs it is the file ``_<name>.py`` beside the record.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

from alignkit.parts.discovery import load_part, names_in
from alignkit.parts.options import Conflict, Ignored


@dataclass(frozen=True)
class Parametrization:
    """One parametrisation, discovered by the name of its file.

    Attributes:
        name: File stem; the value of the config key ``parametrization``.
        summary: One sentence.
        label: What it is called in a sentence, such as "full fine-tuning".
        options: Dataclass of its own options, declared with :func:`alignkit.parts.options.option`. They are keys of
            every program, and refused under another parametrisation.
        has_adapter: Whether an adapter trains beside the model's weights, rather than these, or some of them.
        takes: Other parametrisations whose options it has too, such as those of the adapter below it.
        goes_on: Whether the training of a saved adapter can be continued, with the options that it was made with.
        of_any_adapter: Options that say how it trains, not what it is, and so hold for a saved adapter too.
        ends_on_schedule: Whether what it trains is what is exported only after its own schedule has run to its end.
        has_factors: Whether the adapter is made of pairs of low-rank factors, which a gradient rule may edit alone.
        product: What a model card calls the result, with options in braces; empty where it is a whole model.
        serving: What a model card says of programs that would load the result as something else; empty where none
            would.
        metrics: What it logs beside what every run does, by key: all that is ever logged, and what each is.
        when: When to take it: a sentence or two.
        conflicts: Combinations of its options, with each other or with any key of a program, that cannot work.
        ignored: Keys without effect under some values.
    """

    name: str
    summary: str
    label: str
    options: type
    has_adapter: bool
    takes: tuple[str, ...] = ()
    goes_on: bool = False
    of_any_adapter: tuple[str, ...] = ()
    ends_on_schedule: bool = False
    has_factors: bool = False
    product: str = ""
    serving: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)
    when: str = ""
    conflicts: tuple[Conflict, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    @property
    def also(self) -> tuple[str, ...]:
        """Its own name and those of the parametrisations whose options it has too."""
        return self.name, *self.takes


def parametrization_names() -> list[str]:
    """Names of all parametrisations, from the files in ``alignkit/parametrizations`` (helpers left out)."""
    return names_in("alignkit.parametrizations")


def load_parametrization(name: str) -> Parametrization:
    """Import and return the parametrisation called ``name``; raises KeyError for an unknown one."""
    record: Parametrization = load_part("alignkit.parametrizations", name, "PARAMETRIZATION")
    return record


def parametrizations() -> list[Parametrization]:
    """All of them, those with an adapter first."""
    return sorted(map(load_parametrization, parametrization_names()), key=lambda record: not record.has_adapter)


def load_half(record: Parametrization) -> ModuleType:
    """The half of a parametrisation that needs torch, ``alignkit/parametrizations/_<name>.py``.

    - ``check(config)``: refuses options that can only be judged with torch at hand, before anything is loaded
    - ``prepare(config, model)``: where there is an adapter, PEFT's configuration of the one that a run starts; where
      there is none, it freezes what shall not move and returns None. Refuses what the model has no place for
    - ``go_on(config, model)``: of one that ``goes_on``, makes a saved adapter that was put on the model ready to train
    - ``attach(config, trainer)``: what it does while training, an :class:`~alignkit.models.attachment.Attachment`, or
      None; called once the trainer is built, before anything trains
    """
    return importlib.import_module(f"alignkit.parametrizations._{record.name}")
