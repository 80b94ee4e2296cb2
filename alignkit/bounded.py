"""Trying what came from a file and might never end: in a child process, for so long and with so much memory.

A chat template and a pattern of module names are small programs. One that loops for hours, or doubles a text until
the machine stops, cannot be told from an honest one by reading it, and within C code Python cannot be interrupted.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from jinja2 import TemplateError

TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
"""What a chat template may raise: ``raise_exception``, and all that its expressions can do wrong."""
SECONDS = 10
MEMORY = 2**30
_OUT_OF_MEMORY = 3
_PLAIN = re.compile(r"[\w.\-]*")


def too_much(action: Callable[[], object]) -> str | None:
    """Try ``action`` in a forked child; whatever it raises is left to whoever does it in earnest.

    Args:
        action: Python code that uses no accelerator and no threads.

    Returns:
        ``takes longer than 10 s`` or ``needs more than 1 GiB of memory``; None if it ended by itself.
    """
    child = os.fork()
    if child == 0:
        _act(action)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return None
    if status == -signal.SIGALRM:
        return f"takes longer than {SECONDS} s"
    return f"needs more than {MEMORY // 2**30} GiB of memory"


def slow_pattern(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    """The pattern that takes too long over the names, with what is wrong with it; None if none does.

    Args:
        patterns: Regular expressions; plain names are passed over.
        names: Names of modules.
    """
    for pattern in patterns:
        if _PLAIN.fullmatch(pattern):
            continue
        if (problem := too_much(lambda pattern=pattern: [re.fullmatch(pattern, name) for name in names])) is not None:
            shown = pattern if len(pattern) <= 60 else f"{pattern[:60]} ..."
            return f"{shown!r} {problem} over {len(names)} names of modules"
    return None


def _act(action: Callable[[], object]) -> None:
    """What the child does; it never returns."""
    code = 0
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        action()
    except MemoryError:
        code = _OUT_OF_MEMORY
    finally:
        os._exit(code)
