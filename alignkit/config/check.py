"""Check a configuration: names, then values, then combinations, then files. All problems are collected."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from alignkit.config.compatibility import RULES
from alignkit.config.data_files import check_data
from alignkit.config.keys import PROGRAMS, base_keys, method_keys, methods_with
from alignkit.config.model_files import check_model_files, check_packages
from alignkit.config.names import explain_unknown
from alignkit.config.preference import PreferenceConfig
from alignkit.config.settings import Entry, Origin, Settings
from alignkit.config.values import ValueMismatch, check_value
from alignkit.errors import ConfigError
from alignkit.methods.method import load_method


def build_config(settings: Settings, headline: str, *, check_files: bool) -> PreferenceConfig:
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
    options = _method_options(settings)
    for rule in RULES:
        rule.check(settings)
    if check_files:
        check_model_files(settings)
        check_data(settings)
        check_packages(settings)
    if settings.problems:
        ordered = sorted(settings.problems, key=lambda problem: problem.origin.order)
        raise ConfigError(headline, [str(problem) for problem in ordered])
    base = {name: settings.values[name] for name in base_keys(settings.program)}
    return PROGRAMS[settings.program](**base, method_options=options)


def validate_config(config: PreferenceConfig) -> None:
    """Check a config made in Python; what differs from the default counts as set by the user.

    Raises:
        ConfigError: Lists everything wrong.
    """
    name = type(config).__name__
    origin = Origin(name)
    entries = {key: Entry(value, origin) for key, value in flatten(config).items()}
    settings = Settings(config.program, origin, entries)
    expected = load_method(settings.method).options if settings.method else object
    if settings.method and not isinstance(config.method_options, expected):
        given = type(config.method_options).__name__
        settings.report(
            "method", f"takes {expected.__name__}, not {given}", f"Write method_options={expected.__name__}()"
        )
    settings.entries = {
        key: entry
        for key, entry in entries.items()
        if key not in settings.keys or settings.keys[key].required or entry.value != settings.keys[key].default
    }
    build_config(settings, f"{name} cannot work", check_files=True)


def flatten(config: PreferenceConfig) -> dict[str, Any]:
    """All values by key, the method's options beside the others, in the order of the sections."""
    values = {name: getattr(config, name) for name in base_keys(config.program)}
    options = config.method_options
    return {**values, **({f.name: getattr(options, f.name) for f in fields(options)} if is_dataclass(options) else {})}


def _check_names(settings: Settings) -> None:
    for name in [name for name in settings.entries if name not in settings.keys]:
        # The options of a method that is itself wrong or missing are judged once that is mended.
        if settings.method is not None or not methods_with(settings.program, name):
            why, fix = explain_unknown(settings.program, settings.method, name, settings.entries[name].value)
            settings.report(name, why, fix)


def _check_values(settings: Settings) -> None:
    for name, key in settings.keys.items():
        if name in settings.entries:
            try:
                settings.values[name] = check_value(key, settings.entries[name].value)
            except ValueMismatch as mismatch:
                settings.report(name, mismatch.why, mismatch.fix)
        elif key.required:
            choices = f" One of {', '.join(key.info.choices)}" if key.info.choices else ""
            settings.report_missing(name, "is required and not given", f"Add it: {key.info.help}{choices}")
        else:
            settings.values[name] = key.default


def _method_options(settings: Settings) -> Any:
    """The method's options; an options class may refuse combinations by raising ValueError."""
    if settings.method is None or not all(name in settings.values for name in method_keys(settings.method)):
        return None
    try:
        return load_method(settings.method).options(
            **{name: settings.values[name] for name in method_keys(settings.method)}
        )
    except ValueError as error:
        settings.report("method", f"cannot take these options: {error}", "Change one of them")
        return None
