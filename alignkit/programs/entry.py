"""How every program ends: what is printed about an error, and with which exit status."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from alignkit.environment import ignore_notices
from alignkit.errors import AlignkitError, RanksDifferError, Stopped
from alignkit.plain_text import guard_streams, visible, without_secrets
from alignkit.storage.refusals import storage_error

EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128
"""Added to the number of the signal that stopped a run, as a shell does: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM."""
EXIT_INTERRUPTED = EXIT_SIGNAL + signal.SIGINT
EXIT_BROKEN_PIPE = 141


def disable_telemetry() -> None:
    """Switch off what the Hugging Face libraries report of their use, unless the environment says otherwise.

    ``datasets`` counts every data set opened, local files included, by a request to the Hub.

    They read these variables when imported, so this must run before them.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def quiet_dependencies() -> None:
    """Keep notices about the insides of the dependencies, which a user can do nothing about, out of the output."""
    ignore_notices()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A filter, because DeepSpeed sets the level of its logger when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # The reducer of DDP prints its notices from C++, where no Python filter sees them; read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def bars_for_terminals() -> None:
    """Progress bars only where they can be redrawn: in a file or a pipe each state would be a line of its own.

    tqdm reads the variable when imported; what is written above a bar, such as the line of a log, is still written.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit.

    An :class:`AlignkitError` is printed without a traceback and ends with status 2, as is a disk that is full or
    refuses; what a signal stopped ends with 128 and its number. Any other exception is a bug of ours and keeps its
    traceback. No secret and no raw control character is printed.

    Args:
        main: The program; returns its exit status, None for success.
    """
    disable_telemetry()
    quiet_dependencies()
    bars_for_terminals()
    guard_streams()
    try:
        status = main() or 0
        sys.stdout.flush()
        _take_leave()
    except AlignkitError as error:
        _print_error(error)
        status = EXIT_USER_ERROR
    except Stopped as stopped:
        print(str(stopped) or f"stopped by {signal.Signals(stopped.signal).name}", file=sys.stderr)
        _take_leave()
        status = EXIT_SIGNAL + stopped.signal
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left. Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_BROKEN_PIPE
    except Exception as error:
        told = storage_error(error)
        if told is None:
            _leave_for_launcher(f"{type(error).__name__}: {error}")
            raise
        _print_error(told)
        status = EXIT_USER_ERROR
    sys.exit(status)


def _take_leave() -> None:
    """End the group of processes, where all of them have come to their end.

    A group that is alive when Python ends may abort its process, and a run that is finished would be called failed.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _print_error(error: AlignkitError) -> None:
    """Print an error once a machine, where the processes of a launch all find the same."""
    if _is_said_by_another_process(str(error)):
        return
    rank = os.environ.get("RANK", "0")
    if isinstance(error, RanksDifferError):
        # All processes find this; where no launcher lets us see what another one has printed, the first one speaks.
        if rank != "0" and "TORCHELASTIC_ERROR_FILE" not in os.environ:
            return
        prefix = "error"
    else:
        prefix = "error" if rank == "0" else f"[rank {rank}] error"
    print(f"{prefix}: {error}", file=sys.stderr, flush=True)
    _leave_for_launcher(str(error))


def _leave_for_launcher(message: str) -> None:
    """Put ``message`` where torch's launcher looks for it: its report is the last thing a user sees of a launch.

    The report shows the error that was left first, and so the cause, not what other processes met because of it.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is not None:
        shown = visible(without_secrets(message))
        content = {"message": {"message": shown, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(error_file).write_text(json.dumps(content), encoding="utf-8")


def _is_said_by_another_process(message: str) -> bool:
    """Whether a process of the same launch on this machine has printed ``message``.

    torch's launcher gives each process a file for its errors, in a folder that these share and that it deletes at the
    end. A mark there is made by whoever comes first.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is None:
        return False
    mark = Path(error_file).parents[1] / f"said-{hashlib.sha256(message.encode()).hexdigest()[:16]}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False
