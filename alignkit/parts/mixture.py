"""Sums of methods, such as ``{ipo: 1.0, sft: 0.2}``: one method whose terms are those of several, each with a weight.

A mixture is called by its text, ``1.0*ipo+0.2*sft``, which is also the value of the config key ``method`` in force.
Options of its own are fixed inside it, ``1.0*ipo(beta=0.3)+0.2*sft``; all others are keys beside ``method``, as
those of any method are. No part is looked up here, and torch is not imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from alignkit.losses.types import LossOutput, LossTerm, Metric
    from alignkit.parts.method import Method

WEIGHT = "weight"
"""Key of the weight where a component is written with options of its own."""
_COMPONENT = re.compile(r"\s*(?:(?P<weight>[0-9.eE+-]+)\s*\*\s*)?(?P<name>[a-z]\w*)\s*(?:\((?P<options>[^()]*)\))?\s*")
_BOUNDS: Mapping[str, Callable[..., float]] = {"gt": max, "ge": max, "lt": min, "le": min}


class MixtureError(ValueError):
    """Methods cannot be added up as they are written; ``fix`` says what to write instead."""

    def __init__(self, why: str, fix: str) -> None:
        self.why, self.fix = why, fix
        super().__init__(f"{why}. {fix}")


@dataclass(frozen=True)
class Component:
    """One method of a mixture.

    Attributes:
        name: Of the method.
        weight: What its loss is multiplied by; > 0.
        options: Those that are fixed inside the mixture.
    """

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ",".join(f"{key}={json.dumps(value)}" for key, value in self.options.items())
        return f"{self.weight!r}*{self.name}" + (f"({inside})" if inside else "")


def components_of(value: str | Mapping[Any, Any]) -> tuple[Component, ...]:
    """The methods that are added up, in the order they are written in; that of a plain name is one.

    Args:
        value: A mapping of names to weights, or to mappings of ``weight`` and options; or the text of a mixture.

    Raises:
        MixtureError: It is not written so.
    """
    found = tuple(_of_mapping(value) if isinstance(value, Mapping) else _of_text(value))
    if not found:
        raise MixtureError("names no method", "Write {ipo: 1.0, sft: 0.2}")
    for component in found:
        if not (math.isfinite(component.weight) and component.weight > 0):
            raise MixtureError(f"gives {component.name} the weight {component.weight:g}", "Write a weight > 0")
        if [each.name for each in found].count(component.name) > 1:
            raise MixtureError(f"names {component.name} twice", "Give each method one weight")
    return found


def text_of(components: Sequence[Component]) -> str:
    """What a mixture is called; a method that stands alone with the weight 1 is called by its own name."""
    if len(components) == 1 and components[0].weight == 1 and not components[0].options:
        return components[0].name
    return "+".join(map(str, components))


def is_mixture(name: str) -> bool:
    """Whether a text is that of a mixture and not the name of a method."""
    return "*" in name or "+" in name


def _of_mapping(value: Mapping[Any, Any]) -> Iterable[Component]:
    for name, given in value.items():
        inside = dict(given) if isinstance(given, Mapping) else {WEIGHT: given}
        weight = inside.pop(WEIGHT, 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise MixtureError(
                f"gives {name} {json.dumps(weight, default=str)} as its weight", f"Write {{{name}: 1.0}}"
            )
        yield Component(str(name), float(weight), inside)


def _of_text(text: str) -> Iterable[Component]:
    position = 0
    while position < len(text):
        match = _COMPONENT.match(text, position)
        if match is None or text[match.end() : match.end() + 1] not in ("", "+"):
            raise MixtureError(f"cannot be read from {text[position:]!r} on", "Write {ipo: 1.0, sft: 0.2}")
        try:
            weight = float(match["weight"] or 1.0)
            options = dict(_option(each) for each in (match["options"] or "").split(",") if each)
        except ValueError:
            raise MixtureError(f"cannot be read at {match[0].strip()!r}", "Write {ipo: 1.0, sft: 0.2}") from None
        yield Component(match["name"], weight, options)
        position = match.end() + 1
        if position == len(text):  # one + was read beyond the component
            raise MixtureError("ends with +", "Name another method, or leave it out")


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    return key.strip(), json.loads(value)


def mixture(components: Sequence[Component], methods: Sequence[Method]) -> Method:
    """The method that adds up others.

    Options that several have are one key; where their defaults differ, a value must be written. What is logged under a
    name that is taken has the name of its method in front.

    Args:
        components: As :func:`components_of` returns them.
        methods: The method of each, whose objectives take the same batches.

    Raises:
        MixtureError: They do not go together.
    """
    name, prepares = text_of(components), _who_prepares(methods)
    for component, method in zip(components, methods, strict=True):
        if component.options and method.is_special:
            raise MixtureError(f"fixes options of {method.name}, which the run reads too", "Write them beside `method`")
    options = _options_class(name, components, methods)
    exact = sorted({method.num_candidates for method in methods if method.num_candidates is not None})
    if len(exact) > 1:
        raise MixtureError(f"asks for {' and for '.join(map(str, exact))} completions a row", "Take methods that agree")
    return replace(
        prepares,
        name=name,
        summary="Adds up " + " and ".join(f"{each.weight:g} x {each.name}" for each in components) + ".",
        options=options,
        objective=_objective(components, methods),
        metrics=_metrics(methods),
        paper=methods[0].paper,
        fidelity="; ".join(f"{method.name}: {method.fidelity}" for method in methods),
        needs=lambda chosen: frozenset().union(*(m.needs(o) for m, o in zip(methods, chosen.each(), strict=True))),
        num_candidates=exact[0] if exact else None,
        conflicts=(),
        ignored=(),
        lowers_chosen=any(method.lowers_chosen for method in methods),
        mixed=tuple(methods),
    )


def _who_prepares(methods: Sequence[Method]) -> Method:
    """The one method that does more in a run than its loss; the first, where none does."""
    if len({method.row_family for method in methods}) > 1:
        own, other = sorted(methods, key=lambda method: method.row_family is None)[:: len(methods) - 1]
        raise MixtureError(f"{own.name} has rows of its own, which {other.name} does not train on", "Keep one of them")
    special = [method for method in methods if method.is_special]
    if len(special) > 1:
        names = " and ".join(method.name for method in special)
        raise MixtureError(f"{names} each have rows or references of their own", "Keep one of them")
    return special[0] if special else methods[0]


def _metrics(methods: Sequence[Method]) -> dict[str, str]:
    metrics: dict[str, str] = {}
    for method in methods:
        metrics |= {_free(metrics, method.name, name): meaning for name, meaning in method.metrics.items()}
    return metrics


def _free(taken: Iterable[str], method: str, name: str) -> str:
    return f"{method}/{name}" if name in taken else name


def _objective(components: Sequence[Component], methods: Sequence[Method]) -> Callable[[Any, Any], LossOutput]:
    def objective(batch: Any, options: Any) -> LossOutput:
        """The weighted terms of all methods on one batch."""
        outputs = [method.objective(batch, own) for method, own in zip(methods, options.each(), strict=True)]
        terms: list[LossTerm] = []
        metrics: dict[str, Metric] = {}
        documented: dict[str, str] = {}
        for component, method, output in zip(components, methods, outputs, strict=True):
            for term in output.terms:
                name = component.name if len(output.terms) == 1 else f"{component.name}/{term.name}"
                terms.append(replace(term, name=name, weight=component.weight * term.weight))
            metrics |= {_free(documented, method.name, name): metric for name, metric in output.metrics.items()}
            documented |= method.metrics
        return replace(outputs[0], terms=tuple(terms), metrics=metrics)

    return objective


def _options_class(name: str, components: Sequence[Component], methods: Sequence[Method]) -> type:
    """The options that are not fixed, as one class; ``each()`` gives the options of every method."""
    owners: dict[str, list[tuple[Method, Any, Field[Any]]]] = {}
    for component, method in zip(components, methods, strict=True):
        hints, own = get_type_hints(method.options), {each.name: each for each in fields(method.options)}
        if unknown := [key for key in component.options if key not in own]:
            has = f"Its options are {', '.join(own)}" if own else "It has none"
            raise MixtureError(f"gives {method.name} an option {unknown[0]!r} that it does not have", has)
        _refuse_without_effect(component, own)
        for key in own.keys() - component.options.keys():
            owners.setdefault(key, []).append((method, hints[key], own[key]))
    declared = [(key, owners[key][0][1], _shared(key, owners[key])) for key in sorted(owners)]

    def each(self: Any) -> list[Any]:
        chosen = vars(self)
        return [
            method.options(**{f.name: (chosen | component.options)[f.name] for f in fields(method.options)})
            for component, method in zip(components, methods, strict=True)
        ]

    namespace = {"each": each, "__post_init__": lambda self: self.each() and None, "__doc__": f"Options of {name}."}
    return make_dataclass("MixtureOptions", declared, namespace=namespace, frozen=True, kw_only=True)


def _refuse_without_effect(component: Component, own: Mapping[str, Field[Any]]) -> None:
    """An option that is fixed has an effect, by what it depends on: another one that is fixed, or its default."""
    for key in component.options:
        needed = own[key].metadata["option"].only_with
        if needed is not None and not needed.holds(component.options.get(needed.key, own[needed.key].default)):
            fix = f"Write {needed.key}: {json.dumps(needed.example)} beside it, or leave it out"
            raise MixtureError(f"gives {component.name} {key}, which has no effect without {needed.key}", fix)


def _shared(key: str, owners: Sequence[tuple[Method, Any, Field[Any]]]) -> Any:
    """The field of an option of one method or several."""
    (first, hint, own), *others = owners
    if not others:
        return field(default=own.default, default_factory=own.default_factory, metadata=own.metadata)
    info, names = own.metadata["option"], " and ".join(method.name for method, *_ in owners)
    for method, other_hint, other in others:
        other_info = other.metadata["option"]
        if other_hint != hint or other_info.choices != info.choices:
            plain = first if method.is_special else method
            inside = f"{{{plain.name}: {{weight: 1.0, {key}: ...}}}}"
            raise MixtureError(
                f"{key} of {first.name} is another kind of value than that of {method.name}", f"Write {inside}"
            )
        limits = {
            name: [v for v in (getattr(info, name), getattr(other_info, name)) if v is not None] for name in _BOUNDS
        }
        info = replace(info, **{name: _BOUNDS[name](v) if v else None for name, v in limits.items()})
    defaults = [each.default for _, _, each in owners]
    differ = any(default != defaults[0] for default in defaults)
    if differ:
        listed = ", ".join(f"{method.name} {each.default}" for method, _, each in owners)
        text = (
            f"Of {names}, whose own defaults differ ({listed}); or write it inside, {{{first.name}: {{{key}: ...}}}}."
        )
        return field(metadata={**own.metadata, "option": replace(info, help=text)})
    info = replace(info, help=f"{info.help} (Of {names}.)")
    return field(default=own.default, default_factory=own.default_factory, metadata={"option": info})
