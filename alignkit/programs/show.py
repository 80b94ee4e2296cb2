"""What there is: methods, gradient rules, parametrisations, formats and keys, as lists and one by one.

    alignkit methods
    alignkit methods ipo
    alignkit keys lora_rank

Everything is read off the records of the parts, which the documentation is made of, too.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from alignkit.config.command_line import describe_key
from alignkit.config.foreign_keys import METHODS, WRITE
from alignkit.config.keys import Key, base_keys, method_keys, program_methods, rule_keys
from alignkit.config.method_value import method_text
from alignkit.config.names import explain_unknown
from alignkit.config.values import ValueMismatch
from alignkit.config.values import show as in_yaml
from alignkit.errors import AlignkitError
from alignkit.parts.data_format import format_names, load_format
from alignkit.parts.method import Method, load_method, method_names
from alignkit.parts.parametrization import Parametrization, load_parametrization, parametrization_names
from alignkit.parts.rule import GradientRule, load_rule, rule_names
from alignkit.parts.shape import shapes_by_program

WIDTH = 100


def show(kind: str, name: str | None) -> str:
    """A list of all of a kind, or everything of one.

    Args:
        kind: ``methods``, ``rules``, ``parametrizations``, ``formats`` or ``keys``.
        name: Of one, a mixture of methods among them; None lists all.

    Raises:
        AlignkitError: There is none of that name.
    """
    listing, one, names = _KINDS[kind]
    if name is None:
        return "\n".join(listing())
    if kind in ("methods", "keys") or name in names():
        return "\n".join(one(name))
    raise AlignkitError(_unknown(kind, name, names()))


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]}?" if near else f"There are {', '.join(names)}."
    if kind == "methods" and name.lower() in METHODS:
        advice = f"{METHODS[name.lower()]}."
    return f"there is no {name!r} among the {kind}. {advice}"


def _lines(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return _lines(text, indent, indent)


def _heading(text: str) -> list[str]:
    return ["", text]


# --- methods -------------------------------------------------------------------------------------------------------


def _methods() -> Iterator[str]:
    for program, shape in shapes_by_program().items():
        methods = [load_method(name) for name in program_methods(program)]
        yield f"{program}: {shape.summary}"
        width = max(len(method.name) for method in methods)
        for method in methods:
            yield from _entry(method.name, method.summary, width)
        yield ""
    yield "alignkit methods NAME says everything of one: when to take it, options, metrics, paper."
    yield "Several are added up with a weight each: method: {dpo: 1.0, sft: 0.2}"


def _entry(name: str, text: str, width: int) -> list[str]:
    return _lines(f"{name:<{width}}  {text}", "  ", " " * (width + 4))


def _method(name: str) -> Iterator[str]:
    method = _found_method(name)
    yield f"{method.name}: {method.summary}"
    for part in method.mixed:
        yield from _wrapped(f"{part.name}: {part.summary}")
    rows = shapes_by_program()[method.program].rows_of(method)
    needs = ", ".join([*(need.replace("_", " ") for need in sorted(method.needs(_defaults(method)))), rows])
    if method.when:
        yield from _wrapped(f"When: {method.when}")
    yield from _wrapped(f"Needs: {needs}")
    yield from _wrapped(f"Fidelity: {method.fidelity}")
    for part in method.parts:
        yield from _wrapped(f"Paper: {part.paper.title} ({part.paper.url})")
    yield from _options(method_keys(method.name))
    if method.metrics:
        yield from _heading("Logged beside the loss:")
        for key, meaning in method.metrics.items():
            yield from _lines(f"{key}: {meaning}", "  ", " " * 6)
    yield from _heading("To train with it:")
    yield f"  alignkit train --method '{method.name}' --model MODEL --data FILE --output_dir runs/first"


def _found_method(name: str) -> Method:
    problems = []
    for program in shapes_by_program():
        try:
            return load_method(method_text(program, name))
        except ValueMismatch as mismatch:
            problems.append(mismatch)
    if name.isidentifier():
        raise AlignkitError(_unknown("methods", name, method_names()))
    raise AlignkitError(f"{name!r} {problems[0].why}. {problems[0].fix}")


def _defaults(method: Method) -> Any:
    """The default options; of a mixture whose defaults differ, what its first method has of them."""
    keys = method_keys(method.name).values()
    first = {key: each.default for part in reversed(method.parts) for key, each in method_keys(part.name).items()}
    return method.options(**{key.name: first[key.name] for key in keys if key.required})


def _options(keys: Mapping[str, Key]) -> Iterator[str]:
    yield from _heading("Options, which stand beside `method` in the same file:" if keys else "It has no options.")
    for key in keys.values():
        yield from describe_key(key)


# --- rules, parametrisations and formats ---------------------------------------------------------------------------


def _list_of(names: Callable[[], list[str]], load: Callable[[str], Any], word: str) -> Callable[[], Iterator[str]]:
    def listing() -> Iterator[str]:
        width = max(map(len, names()))
        for name in names():
            yield from _entry(name, load(name).summary, width)
        yield f"\nalignkit {word} NAME says everything of one."

    return listing


def _rule(name: str) -> Iterator[str]:
    rule: GradientRule = load_rule(name)
    yield f"{rule.name}: {rule.summary}"
    if rule.when:
        yield from _wrapped(f"When: {rule.when}")
    passes = "two forward and backward passes a micro-batch" if rule.displacement else "no pass more"
    yield from _wrapped(f"Costs: {passes}")
    yield from _wrapped(f"Fidelity: {rule.fidelity}")
    yield from _wrapped(f"Paper: {rule.paper.title} ({rule.paper.url})")
    yield from _heading("Options, which stand beside `gradient_rule` in the same file:")
    for key in rule_keys(name).values():
        yield from describe_key(key)


def _parametrization(name: str) -> Iterator[str]:
    record: Parametrization = load_parametrization(name)
    yield f"{record.name}: {record.summary}"
    if record.when:
        yield from _wrapped(f"When: {record.when}")
    keys = [key for key in base_keys("sft").values() if key.name in _own_options(record)]
    yield from _heading("Options:" if keys else "It has no options.")
    for key in keys:
        yield from describe_key(key)


def _own_options(record: Parametrization) -> set[str]:
    return {name for also in record.also for name in load_parametrization(also).options.__dataclass_fields__}


def _format(name: str) -> Iterator[str]:
    yield f"{name}: {load_format(name).summary}"
    yield "  It is recognised by itself, from the content of the first rows; `alignkit data FILE` says which was found."


# --- keys ----------------------------------------------------------------------------------------------------------


def _all_keys() -> dict[str, list[tuple[str, Key]]]:
    """Every key with those that have it: programs, methods and rules."""
    found: dict[str, list[tuple[str, Key]]] = {}
    owners = [(f"program {program}", base_keys(program)) for program in shapes_by_program()]
    owners += [(f"method {name}", method_keys(name)) for name in method_names()]
    owners += [(f"gradient rule {name}", rule_keys(name)) for name in rule_names()]
    for owner, keys in owners:
        for key in keys.values():
            found.setdefault(key.name, []).append((owner, key))
    return found


def _keys() -> Iterator[str]:
    sections: dict[str, dict[str, Key]] = {}
    for owned in _all_keys().values():
        for _, key in owned:
            sections.setdefault(key.section, {})[key.name] = key
    for section, keys in sections.items():
        listed = ", ".join(name if key.required else f"{name} ({in_yaml(key.default)})" for name, key in keys.items())
        yield section
        yield from _wrapped(listed)
    yield "\nDefaults stand in brackets. alignkit keys KEY says everything of one."


def _key(name: str) -> Iterator[str]:
    plain = name.replace("-", "_")
    found = _all_keys()
    if plain in found:
        for key, owners in _distinct(found[plain]):
            yield f"Of {', '.join(owners)}:"
            yield from describe_key(key)
        if plain in WRITE:
            yield f"Other toolkits have a key of that name, for which write {WRITE[plain]}."
        return
    near = [key for key in found if plain in key]
    if near:
        yield f"No key is called {name}. These have it in their names: {', '.join(near)}"
        return
    why, fix = explain_unknown("preference", None, plain, None)
    yield f"{name} {why}. {fix}."


def _distinct(owned: Iterable[tuple[str, Key]]) -> list[tuple[Key, list[str]]]:
    """The keys of one name that differ in what is said of them, each with those that have it."""
    found: list[tuple[Key, list[str]]] = []
    for owner, key in owned:
        same = next((owners for other, owners in found if (other.info, other.type) == (key.info, key.type)), None)
        if same is None:
            found.append((key, [owner]))
        else:
            same.append(owner)
    return found


_Listing, _One = Callable[[], Iterator[str]], Callable[[str], Iterator[str]]
_KINDS: dict[str, tuple[_Listing, _One, Callable[[], list[str]]]] = {
    "methods": (_methods, _method, method_names),
    "rules": (_list_of(rule_names, load_rule, "rules"), _rule, rule_names),
    "parametrizations": (
        _list_of(parametrization_names, load_parametrization, "parametrizations"),
        _parametrization,
        parametrization_names,
    ),
    "formats": (_list_of(format_names, load_format, "formats"), _format, format_names),
    "keys": (_keys, _key, lambda: sorted(_all_keys())),
}
