"""Strict command lines: no abbreviations; an unknown option is answered with the nearest one."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from alignkit.errors import ConfigError


class StrictParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose complaints are :class:`~alignkit.errors.ConfigError`.

    Args:
        description: Shown by ``--help``.
        epilog: Shown after the options, as written; usually example commands.
        prog: What the program is called in its usage and complaints, by default the name of the file that was started.
    """

    def __init__(self, description: str, epilog: str = "", *, prog: str | None = None) -> None:
        self._names: list[str] = []
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Declare an argument, as argparse does; its default is added to the help.

        Args:
            *names: Option names, or the name of a positional argument.
            **options: As in argparse.
        """
        self._names += [name for name in names if name.startswith("-")]
        action = super().add_argument(*names, **options)
        has_default = isinstance(action.default, (str, int, float)) and not isinstance(action.default, bool)
        if has_default and action.default != argparse.SUPPRESS:
            action.help = f"{action.help + '; ' if action.help else ''}default %(default)s"
        return action

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line; every unknown option is reported, each with the nearest known one.

        Args:
            arguments: Words to parse; those of this process by default.
        """
        words = sys.argv[1:] if arguments is None else list(arguments)
        given = dict.fromkeys(word.split("=", 1)[0] for word in words if word.startswith("--"))
        unknown = [name for name in given if name not in self._names]
        if unknown:
            raise ConfigError(self.prog, [self._advice(name) for name in unknown])
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ConfigError(self.prog, [f"{message} (see --help)"])

    def _advice(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._names, n=1)
        return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else " (see --help)")


LARGEST = 2**31 - 1
"""Of the whole numbers that are taken: what generators of random numbers and tensor sizes hold."""


def positive_int(text: str) -> int:
    """An argparse type: a whole number from 1 to ``LARGEST``."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """An argparse type: a whole number from 0 to ``LARGEST``."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    # Longer texts are not even turned into a number: that takes quadratic time.
    if not (text.isdecimal() and len(text) <= 19 and least <= int(text) <= LARGEST):
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {LARGEST}, got {text[:40]!r}")
    return int(text)


def share(text: str) -> float:
    """An argparse type: a number above 0 and up to 1."""
    value = non_negative_float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share, above 0 and up to 1, got {text!r}")
    return value


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value


def column_pair(text: str) -> tuple[str, str]:
    """An argparse type: ``ours=theirs``."""
    ours, equals, theirs = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected OURS=THEIRS such as prompt=question, got {text!r}")
    return ours, theirs


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options of how a model and its tokenizer are loaded, of all programs that run one."""
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none", help="of the base weights")
    parser.add_argument("--attn_implementation", choices=("eager", "sdpa", "flash_attention_2", "flex_attention"))
    parser.add_argument("--chat_template", type=Path, metavar="FILE", help="Jinja file in place of the tokenizer's")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def pick(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the options, to hand on."""
    return {name: getattr(arguments, name) for name in names}
