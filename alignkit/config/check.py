"""Check a configuration: names, then values, then combinations, then files. All problems are collected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Protocol

from alignkit.config.best import check_best
from alignkit.config.compatibility import REFUSALS
from alignkit.config.data_files import check_data
from alignkit.config.foreign_keys import WRITE
from alignkit.config.kernels import check_attention
from alignkit.config.keys import Key, base_keys, method_keys, methods_with, rule_keys, rules_with
from alignkit.config.method_value import method_text
from alignkit.config.model_files import check_model_files, check_packages
from alignkit.config.names import explain_method, explain_rule_option, explain_unknown
from alignkit.config.optimizers import check_optimizer
from alignkit.config.reward_names import check_rewards
from alignkit.config.schedules import check_schedule
from alignkit.config.settings import COMMAND_LINE, Entry, Origin, Problem, Settings
from alignkit.config.values import ValueMismatch, check_value
from alignkit.errors import ConfigError
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import parametrizations
from alignkit.parts.rule import load_rule
from alignkit.parts.shape import shapes_by_program

SURELY_THEIRS = 3
"""Keys of another toolkit from which on a file is taken to be written for it."""


class Configuration(Protocol):
    """What is read here of the configuration of any program, beside the values of its keys."""

    program: ClassVar[str]

    @property
    def method_options(self) -> Any:
        """The method's own options."""

    @property
    def gradient_rule(self) -> str | None:
        """Name of the gradient rule."""

    @property
    def gradient_options(self) -> Any:
        """The rule's own options."""


def build_config(settings: Settings, headline: str, *, check_files: bool) -> Configuration:
    """The config object of ``settings``.

    Args:
        settings: What the user set; problems already found are reported with the rest.
        headline: First line of the error.
        check_files: Also look at the files, folders and Python packages that the config asks for.

    Raises:
        ConfigError: Lists everything wrong.
    """
    _check_names(settings)
    _check_values(settings)
    options = _options(settings, "method", settings.method, load_method, method_keys)
    gradient = _options(settings, "gradient_rule", settings.gradient_rule, load_rule, rule_keys)
    for refusal in REFUSALS:
        refusal.check(settings)
    check_schedule(settings)
    check_attention(settings)
    check_optimizer(settings)
    check_best(settings)
    if check_files:
        check_model_files(settings)
        check_data(settings)
        check_rewards(settings)
        check_packages(settings)
    if settings.problems:
        ordered = sorted(settings.problems, key=lambda problem: problem.origin.order)
        raise ConfigError(headline, [str(problem) for problem in [*_another_toolkit(settings), *ordered]])
    base = {name: settings.values[name] for name in base_keys(settings.program)}
    config: Configuration = shapes_by_program()[settings.program].config(
        **base, method_options=options, gradient_options=gradient
    )
    return config


def validate_config(config: Configuration) -> None:
    """Check a config made in Python; what differs from the default counts as set by the user.

    Raises:
        ConfigError: Lists everything wrong.
    """
    name = type(config).__name__
    origin = Origin(name)
    entries = {key: Entry(value, origin) for key, value in flatten(config).items()}
    settings = Settings(config.program, origin, entries)
    if settings.method:
        _check_class(settings, "method", load_method(settings.method).options, "method_options", config.method_options)
    expected = load_rule(settings.gradient_rule).options if settings.gradient_rule else type(None)
    if settings.gradient_rule or config.gradient_rule is None:
        _check_class(settings, "gradient_rule", expected, "gradient_options", config.gradient_options)
    settings.entries = {
        key: entry
        for key, entry in entries.items()
        if key not in settings.keys or settings.keys[key].required or entry.value != settings.keys[key].default
    }
    build_config(settings, f"{name} cannot work", check_files=True)


def flatten(config: Configuration) -> dict[str, Any]:
    """All values by key, the options of method and gradient rule beside the others, in the order of the sections.

    Options of a parametrisation that is not in force are there where they are not the default.
    """
    keys = base_keys(config.program)
    values = {name: getattr(config, name) for name in keys}
    records = parametrizations()
    chosen = [record for record in records if record.name == values.get("parametrization")]
    own = {name for record in chosen for name in record.also}
    unused = {f.name for record in records if record.name not in own for f in fields(record.options)}
    unused -= {f.name for record in records if record.name in own for f in fields(record.options)}
    values = {name: value for name, value in values.items() if name not in unused or value != keys[name].default}
    for options in (config.method_options, config.gradient_options):
        if is_dataclass(options):
            values |= {f.name: getattr(options, f.name) for f in fields(options)}
    return values


def in_force(config: Configuration) -> dict[str, Any]:
    """The values of :func:`flatten`, with what null stands for where a default depends on another key."""
    values = flatten(config)
    for name, key in base_keys(config.program).items():
        if key.info.derived is not None and values[name] is None:
            values[name] = key.info.derived.values[values[key.info.derived.key]]
    return values


def _check_class(settings: Settings, key: str, expected: type, argument: str, given: Any) -> None:
    """Options of another method or rule would be read as far as their names agree."""
    if not isinstance(given, expected):
        wanted = "None" if expected is type(None) else f"{expected.__name__}()"
        settings.report(key, f"takes {wanted.strip('()')}, not {type(given).__name__}", f"Write {argument}={wanted}")


def _another_toolkit(settings: Settings) -> list[Problem]:
    """The one thing to say first of a file that was written for another toolkit."""
    file = settings.home.label
    theirs = [name for name in settings.entries if name not in settings.keys and name in WRITE]
    theirs = [name for name in theirs if settings.source(name).startswith(f"{file}:")]
    if len(theirs) < SURELY_THEIRS:
        return []
    what = f"`{'`, `'.join(theirs[:SURELY_THEIRS])}`"
    fix = f"Make a config of ours of it: alignkit translate {file} > run.yaml"
    return [Problem(settings.home, what, "are keys of another toolkit", fix)]


def _check_names(settings: Settings) -> None:
    chosen_rule = settings.entries.get("gradient_rule")
    rule_is_wrong = chosen_rule is not None and chosen_rule.value is not None and settings.gradient_rule is None
    for name in [name for name in settings.entries if name not in settings.keys]:
        # The options of a method or rule that is itself wrong or missing are judged once that is mended.
        if settings.method is None and methods_with(settings.program, name):
            continue
        if chooser := _overridden_chooser(settings, name):
            settings.take_back(name, (chooser,))
            continue
        if rules_with(name):
            if not rule_is_wrong:
                settings.report(name, *explain_rule_option(settings.gradient_rule, name))
            continue
        value = settings.entries[name].value
        settings.report(name, *explain_unknown(settings.program, settings.method, name, value, settings.gradient_rule))


def _overridden_chooser(settings: Settings, name: str) -> str | None:
    """The key that chose a part with this option in the file, where the command line has chosen another part."""
    if settings.source(name) == COMMAND_LINE:
        return None
    owners = {"method": methods_with(settings.program, name), "gradient_rule": rules_with(name)}
    return next((key for key, found in owners.items() if found and settings.is_overridden(key)), None)


def _check_values(settings: Settings) -> None:
    for name, key in settings.keys.items():
        if name in settings.entries:
            try:
                value = settings.entries[name].value
                settings.values[name] = (
                    method_text(settings.program, value) if name == "method" else check_value(key, value)
                )
            except ValueMismatch as mismatch:
                known = explain_method(settings.entries[name].value) if name == "method" else None
                settings.report(name, mismatch.why, known or mismatch.fix)
        elif key.required:
            choices = f" One of {', '.join(key.info.choices)}" if key.info.choices else ""
            settings.report_missing(name, "is required and not given", f"Add it: {key.info.help}{choices}")
        else:
            settings.values[name] = key.default


def _options(
    settings: Settings, key: str, name: str | None, load: Callable[[str], Any], keys: Callable[[str], Mapping[str, Key]]
) -> Any:
    """The options of the chosen method or rule; an options class may refuse combinations by raising ValueError."""
    if name is None or not all(option in settings.values for option in keys(name)):
        return None
    try:
        return load(name).options(**{option: settings.values[option] for option in keys(name)})
    except ValueError as error:
        settings.report(key, f"cannot take these options: {error}", "Change one of them")
        return None
