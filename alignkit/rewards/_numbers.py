"""Numbers and arithmetic that a model wrote, read exactly and in bounded time; nothing is evaluated as Python."""

from __future__ import annotations

import re
from fractions import Fraction

MOST_DIGITS = 60
"""Digits of a number; a longer one is no number."""
MOST_OPERATIONS = 100
"""Length of an expression in numbers and signs; a longer one is not computed."""

_NUMBER = re.compile(r"(?:(?<![\w.)%])[-+])?\$?(?:\d[\d,]*(?:\.\d*)?|\.\d+)%?", re.A)
_PLAIN = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)", re.A)
_PARTS = re.compile(r"\s*(\d+\.?\d*|\.\d+|//|[-+*/()])", re.A)


def as_number(text: str) -> Fraction | None:
    """The number that a text is, as people write one: ``$1,234.50``, ``12%`` (which is 12), ``-3.``; None for others.

    Args:
        text: With white space around it, or a full stop behind it.
    """
    if len(text) > 4 * MOST_DIGITS:
        return None
    plain = text.strip().replace(",", "").replace("$", "").removesuffix("%").removesuffix(".").replace(" ", "")
    digits = sum(map(str.isdecimal, plain))
    return Fraction(plain) if digits <= MOST_DIGITS and _PLAIN.fullmatch(plain) else None


def last_number(text: str) -> Fraction | None:
    """The last number in a text, None where there is none.

    Args:
        text: Of any length; only its last 1,000 characters are read.
    """
    found = _NUMBER.findall(text[-1000:])
    return as_number(found[-1]) if found else None


def evaluate(expression: str) -> Fraction | None:
    """The exact value of sums, differences, products, quotients (``//`` rounds down) and brackets; None for others.

    There are no powers, and neither the numbers nor how many there are may be large, so that the result is not.

    Args:
        expression: Such as ``(2+3)*0.5``.
    """
    parts = _split(expression)
    if parts is None:
        return None
    try:
        value, end = _sum(parts, 0)
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return value if end == len(parts) - 1 else None


def _split(expression: str) -> list[str] | None:
    """Numbers and signs, with an empty part behind the last; None where something else is there or too much."""
    if len(expression) > MOST_OPERATIONS * 8:
        return None
    parts: list[str] = []
    place = 0
    text = expression.rstrip()
    while place < len(text):
        match = _PARTS.match(text, place)
        if match is None or len(parts) == MOST_OPERATIONS or len(match[1]) > MOST_DIGITS:
            return None
        parts.append(match[1])
        place = match.end()
    return [*parts, ""] if parts else None


def _sum(parts: list[str], place: int) -> tuple[Fraction, int]:
    value, place = _product(parts, place)
    while (sign := parts[place]) in ("+", "-"):
        other, place = _product(parts, place + 1)
        value = value + other if sign == "+" else value - other
    return value, place


def _product(parts: list[str], place: int) -> tuple[Fraction, int]:
    value, place = _factor(parts, place)
    while (sign := parts[place]) in ("*", "/", "//"):
        other, place = _factor(parts, place + 1)
        value = value * other if sign == "*" else value / other if sign == "/" else Fraction(value // other)
    return value, place


def _factor(parts: list[str], place: int) -> tuple[Fraction, int]:
    """A number, an expression in brackets, or either with a sign; ValueError for anything else."""
    negative = False
    while parts[place] in ("+", "-"):
        negative ^= parts[place] == "-"
        place += 1
    if parts[place] == "(":
        value, place = _sum(parts, place + 1)
        if parts[place] != ")":
            raise ValueError("a bracket is not closed")
        place += 1
    else:
        value, place = Fraction(parts[place]), place + 1
    return -value if negative else value, place
