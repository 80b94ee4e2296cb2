"""How every program ends: what is printed about an error, and with which exit status."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from alignkit.errors import AlignkitError, ConfigError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def disable_telemetry() -> None:
    """Switch off the usage reports of the Hugging Face libraries, unless the environment says otherwise.

    They read these variables when imported, so this must run before them.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def quiet_dependencies() -> None:
    """Keep notices about the insides of the dependencies, which a user can do nothing about, out of the output."""
    for message in (".*gradient_checkpointing.* is deprecated", "`torch.jit.script.*` is deprecated"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit.

    An :class:`AlignkitError` is printed without a traceback and ends with status 2; an interrupt ends with 130. Any
    other exception is a bug of ours and keeps its traceback.

    Args:
        main: The program; returns its exit status, None for success.
    """
    disable_telemetry()
    quiet_dependencies()
    try:
        status = main() or 0
        sys.stdout.flush()
    except AlignkitError as error:
        _print_error(error)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left. Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_BROKEN_PIPE
    sys.exit(status)


def _print_error(error: AlignkitError) -> None:
    """Print an error once: every process of a launch reads the same config, so there only the first one speaks."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0 and isinstance(error, ConfigError):
        return
    prefix = f"[rank {rank}] error" if rank > 0 else "error"
    print(f"{prefix}: {error}", file=sys.stderr, flush=True)
