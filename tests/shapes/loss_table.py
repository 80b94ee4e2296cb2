"""Which losses are trained on which rows, in which layouts and with which parametrisations: the one list of them.

``test_loss_table.py`` trains every entry for two steps, and ``scripts/docs.py`` writes docs/concepts/losses.md from it.
A new method joins by itself. Torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.config.keys import base_keys
from alignkit.parts.method import Method, load_method, method_names

PROGRAMS = ("preference", "sft", "reward")
"""Those whose rows are all there before training."""
METHODS = [name for name in method_names() if load_method(name).program in PROGRAMS]
EVERYWHERE: Mapping[str, Mapping[str, Any]] = {"full": {"parametrization": "full"}, "LoRA": {"parametrization": "lora"}}
"""Parametrisations that every loss is trained with, in every layout."""
ELSEWHERE: Mapping[str, Mapping[str, Any]] = {
    "QLoRA with glad": {"parametrization": "lora", "quantization": "nf4", "gradient_rule": "glad"},
}
"""What every loss is trained with in one layout: quantised weights under a gradient rule that evaluates twice."""


@dataclass(frozen=True)
class Cell:
    """A run that is tried.

    Attributes:
        method: Value of the key ``method``.
        rows: ``pairs``, ``lists``, ``unpaired``, ``text`` or ``steps``.
        layout: Value of the key ``layout``, None where the program has none.
        how: Key of :data:`EVERYWHERE` or :data:`ELSEWHERE`.
    """

    method: str
    rows: str
    layout: str | None
    how: str

    @property
    def keys(self) -> dict[str, Any]:
        """What its config says beside model, data and output."""
        layout = {} if self.layout is None else {"layout": self.layout}
        return {"method": self.method, **layout, **EVERYWHERE.get(self.how, ELSEWHERE.get(self.how, {}))}

    def __str__(self) -> str:
        """Name of the test."""
        return "-".join(filter(None, [self.method, self.rows, self.layout, self.how]))


def layouts_of(method: Method) -> tuple[str | None, ...]:
    """The layouts of a method, the one that is taken where there is a choice first."""
    if "layout" not in base_keys(method.program):
        return (None,)
    return ("packed", "padded") if method.teacher(method.options()) is None else ("padded",)


def rows_of(method: Method) -> tuple[str, ...]:
    """The kinds of rows that a method is trained on."""
    if method.row_family is not None and "label" in method.row_family().forms[0].columns:
        return ("unpaired",)
    if method.row_family is not None and "labels" in method.row_family().forms[0].columns:
        return ("steps",)
    if method.program == "sft":
        return ("text",)
    if method.row_family is not None:
        return ("lists",) if method.num_candidates is None else ("pairs",)
    return ("pairs",) if method.num_candidates == 2 else ("pairs", "lists")


def cells_of(method: Method) -> list[Cell]:
    """What one method is trained with."""
    first, *others = layouts_of(method)
    rows, *more = rows_of(method)
    cells = [Cell(method.name, rows, layout, how) for layout in (first, *others) for how in EVERYWHERE]
    cells += [Cell(method.name, rows, first, how) for how in ELSEWHERE]
    return cells + [Cell(method.name, kind, first, "LoRA") for kind in more]


CELLS = [cell for name in METHODS for cell in cells_of(load_method(name))]


def table() -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row a method, with what it is trained on and with."""
    body = []
    for name in METHODS:
        cells = [cell for cell in CELLS if cell.method == name]
        layouts = dict.fromkeys(cell.layout for cell in cells if cell.layout)
        full = {how: list(dict.fromkeys(c.layout or "its one" for c in cells if c.how == how)) for how in EVERYWHERE}
        body.append(
            [
                f"[`{name}`](../methods/{name}.md)",
                ", ".join(dict.fromkeys(cell.rows for cell in cells)),
                ", ".join(sorted(layouts)) or "padded",
                *("yes" if full[how] else "-" for how in EVERYWHERE),
                *("yes" if any(cell.how == how for cell in cells) else "-" for how in ELSEWHERE),
                "yes" if name in UNDER_ZERO_2 else "-",
            ]
        )
    return ["loss", "rows", "layouts", *EVERYWHERE, *ELSEWHERE, "ZeRO-2"], body


UNDER_ZERO_2 = METHODS
"""Losses that tests/distributed/test_losses_under_zero.py trains on two processes of DeepSpeed."""
