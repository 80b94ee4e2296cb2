"""What a batch shape is: a configuration, the words and the figure of its runs, and the bridge to a trainer.

Torch is not imported here, so that configs can be checked and ``--help`` answered in a fraction of a second. The half
of a shape that needs it is the file ``_<name>.py`` beside the record, its *bridge*.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from alignkit.parts.discovery import load_part, names_in

if TYPE_CHECKING:
    from alignkit.parts.method import Method


@dataclass(frozen=True)
class Shape:
    """One batch shape, discovered by the name of its file.

    Attributes:
        name: File stem.
        summary: One sentence.
        config: Dataclass of the configuration; its ``program`` names the launch program under ``trainers/``.
        rows: What a method is given, in the words of its page; ``{count}`` stands for the number of candidates.
        verb: What a run does to a model, in the words of a model card: "tuned on preferences with" a method.
        panels: Panels of the figure that a run draws.
        auto_class: Class of transformers that loads the result.
        pipeline: What the Hub calls its task.
    """

    name: str
    summary: str
    config: Any
    rows: str
    verb: str
    panels: tuple[Any, ...]
    auto_class: str = "AutoModelForCausalLM"
    pipeline: str = "text-generation"

    @property
    def program(self) -> str:
        """Launch program under ``trainers/``, which the methods of this shape name."""
        program: str = self.config.program
        return program

    def rows_of(self, method: Method) -> str:
        """What a method of this shape is given, in words."""
        if method.is_unpaired:
            return "one labelled answer a row"
        return self.rows.format(count="any number of" if method.num_candidates is None else method.num_candidates)


def shape_names() -> list[str]:
    """Names of all shapes, from the files in ``alignkit/shapes`` (bridges left out)."""
    return names_in("alignkit.shapes")


def load_shape(name: str) -> Shape:
    """Import and return the shape called ``name``; raises KeyError for an unknown one."""
    shape: Shape = load_part("alignkit.shapes", name, "SHAPE")
    return shape


def shapes_by_program() -> dict[str, Shape]:
    """Launch program to the shape it trains on."""
    return {shape.program: shape for shape in map(load_shape, shape_names())}


def load_bridge(shape: Shape) -> ModuleType:
    """The half of a shape that needs torch, ``alignkit/shapes/_<name>.py``. A run calls, in this order:

    - ``training_arguments(config, common)``: the arguments of the host's trainer, from those that all trainers share
    - ``batches_an_epoch(args, num_rows)``: micro-batches of each process in one pass over so many rows
    - ``other_models(config)``: the models beside the policy, by the config key that names each
    - ``converter(config, tokenizer)``: ``convert(rows, *, name, ...) -> (rows, report)``, which tokenises a split
    - ``prompts(config, tokenizer, splits, converted)``: token ids of held-out prompts that the report answers
    - ``build(config, args, policy, tokenizer, data, *, exchanges_rows, choices, **inherited)``: the trainer
    - ``describe(config, trainer)``: what ``run.json`` and the start line say of it
    """
    return importlib.import_module(f"alignkit.shapes._{shape.name}")
