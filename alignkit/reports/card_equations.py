"""What a model card says of a method and of a gradient rule: the equation, and how sure we are of it."""

from __future__ import annotations

import importlib
import inspect

from alignkit.parts.method import Method
from alignkit.parts.rule import GradientRule


def method_text(method: Method) -> str:
    """The equation of a method's loss and its provenance.

    Args:
        method: The method trained with.
    """
    equation = loss_equation(method.name)
    return (
        f"{equation}\n\nThe symbols are explained in the docstring of `alignkit.losses.{method.name}`.\n\n"
        f"Fidelity: {method.fidelity}."
    )


def rule_text(rule: GradientRule | None) -> str:
    """What was done to the gradient and how sure we are of it; empty without a rule.

    Args:
        rule: The gradient rule, if there was one.
    """
    if rule is None:
        return ""
    paper = f"[{rule.paper.title}]({rule.paper.url})"
    return f"`{rule.name}` ({paper}): {rule.summary}\n\nFidelity: {rule.fidelity}."


def loss_equation(method: str) -> str:
    """The paragraph "Equation (...)::" of a loss docstring, as Markdown.

    Args:
        method: Method name; by convention its loss is ``alignkit.losses.<method>.<method>_loss``.
    """
    loss = vars(importlib.import_module(f"alignkit.losses.{method}"))[f"{method}_loss"]
    lines = inspect.cleandoc(loss.__doc__).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("Equation"))
    head_end = next(i for i in range(start, len(lines)) if lines[i].endswith("::"))
    block = []
    for line in lines[head_end + 1 :]:
        if line and not line.startswith(" "):
            break
        block.append(line)
    return (
        " ".join(lines[start : head_end + 1]).removesuffix(":")
        + "\n\n```\n"
        + inspect.cleandoc("\n".join(block))
        + "\n```"
    )
