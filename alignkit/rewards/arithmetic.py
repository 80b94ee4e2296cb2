"""Arithmetic in worked answers as GSM8K writes them: ``<<48/2=24>>`` beside each step, ``#### 72`` at the end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from alignkit.parts.options import option
from alignkit.parts.reward import Reward, Sample
from alignkit.rewards._numbers import as_number, evaluate, last_number

_ANNOTATION = re.compile(r"<<([^<>]{1,400})>>")
_CLOSING = re.compile(r"(?:####|\bA:)[ \t]*([^\n]{0,200})")


@dataclass(frozen=True, kw_only=True)
class GSM8KAnnotations(Reward):
    """Share of the calculator annotations that are right.

    ``R = right / all``, over every ``<<expression=result>>`` of the completion. One is right where the expression has
    exactly the value of the result, in rational numbers: ``<<1/3=0.33>>`` is wrong unless ``rounded``. An annotation
    that is no arithmetic counts as wrong. Nothing says that the step is a good one: ``<<1+1=2>>`` on every line has
    reward 1, so give this one together with one that reads the answer.
    """

    name = "gsm8k_annotations"
    summary = "Share of the annotations <<a+b=c>> that are arithmetically right."
    fidelity = "ours: the annotations are GSM8K's (arXiv 2110.14168), which has no such reward"

    without: float = option(0.0, help="Reward of a completion that has no annotation.")
    rounded: bool = option(False, help="Also take a result with a decimal point that is the value rounded to it.")

    def score(self, sample: Sample) -> float:
        """The share, or ``without``."""
        found = _ANNOTATION.findall(sample.text)
        return sum(map(self._right, found)) / len(found) if found else self.without

    def _right(self, annotation: str) -> bool:
        expression, _, result = annotation.rpartition("=")
        value, given = evaluate(expression), evaluate(result)
        if value is None or given is None:
            return False
        decimals = len(result.strip().partition(".")[2])
        return value == given or (self.rounded and decimals > 0 and abs(value - given) <= Fraction(1, 2) / 10**decimals)


@dataclass(frozen=True, kw_only=True)
class GSM8KAnswer(Reward):
    """1 where the final number is that of the reference, else 0.

    The final number is the one behind the last ``####`` or ``A:``, or else the last of the completion. A comma between
    thousands, a dollar or percent sign and a full stop behind it change nothing; 18 and 18.0 are equal.
    """

    name = "gsm8k_answer"
    summary = "Whether the number behind ####, or else the last one, is that of the reference."
    fidelity = "ours, of the rule that GSM8K (arXiv 2110.14168) evaluates by"

    column: str = option("answer", help="Column with the reference: a number, or a worked answer that ends in one.")
    marked: bool = option(False, help="Take the number behind #### or A: alone; without the mark the reward is 0.")

    def columns(self) -> tuple[str, ...]:
        """That of the reference."""
        return (self.column,)

    def score(self, sample: Sample) -> float | None:
        """1 or 0; None where the reference holds no number."""
        reference = reference_number(sample.row[self.column])
        if reference is None:
            return None
        return float(final_number(sample.text, marked=self.marked) == reference)


def final_number(text: str, *, marked: bool = False) -> Fraction | None:
    """The number that a worked answer ends in; None where there is none.

    Args:
        text: A completion.
        marked: Whether only a number behind ``####`` or ``A:`` counts.
    """
    closing = _CLOSING.findall(text[-2000:])
    if closing:
        return as_number(closing[-1]) or last_number(closing[-1])
    return None if marked else last_number(text)


def reference_number(value: Any) -> Fraction | None:
    """The number of a reference: itself, or the one that a text ends in.

    Args:
        value: A cell of the data.
    """
    if isinstance(value, str):
        return final_number(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return as_number(str(value)) if is_number else None


REWARDS = (GSM8KAnnotations, GSM8KAnswer)
