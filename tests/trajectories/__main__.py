"""Show that a refactor has changed no number: the same runs before and after it, equal to the last bit.

    make trajectories BASE=<commit>                            record that commit and this tree, and compare
    python -m tests.trajectories record before.json            the first half, kept for several comparisons
    python -m tests.trajectories compare before.json           the second half
    python -m tests.trajectories compare before.json --only dpo-lora sft-full

Recorded is what is on disk after a run: every metric of every step, run.json without times, the names of all files,
and hashes of the weights, of the states of optimizers, of all else that checkpoints and caches hold. The last bits
depend on the machine and on the libraries, so recordings of others are refused, and none is kept in the repository.
The exit status is 0 when all is equal, 1 when something differs, 2 when nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tests.conftest  # noqa: F401  # no network and no telemetry, in here and in all that is started from here
from tests.programs.launching import REPOSITORY
from tests.trajectories.compare import obstacle, report
from tests.trajectories.record import Recording, record, save
from tests.trajectories.runs import RUNS, ZERO2

NAMES = [*RUNS, *ZERO2]


def main() -> int:
    """Record, or record and compare."""
    parser = argparse.ArgumentParser("python -m tests.trajectories", description=__doc__.split("\n\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, argument in (("record", "file"), ("compare", "file"), ("since", "commit")):
        one = commands.add_parser(command)
        one.add_argument(argument, type=Path if argument == "file" else str)
        one.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="RUN", help=", ".join(NAMES))
    arguments = parser.parse_args()
    if arguments.command == "record":
        save(record(REPOSITORY, arguments.only), arguments.file)
        return 0
    if arguments.command == "compare":
        old = json.loads(arguments.file.read_text(encoding="utf-8"))
    else:
        old = of_commit(arguments.commit, arguments.only)
    return judged(old, record(REPOSITORY, arguments.only))


def of_commit(commit: str, names: list[str]) -> Recording:
    """A recording of another commit, checked out for a moment."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "code")
        subprocess.run([*git, "add", "--quiet", "--detach", str(code), commit], check=True)
        try:
            return record(code, names)
        finally:
            subprocess.run([*git, "remove", "--force", str(code)], check=True)


def judged(old: Recording, new: Recording) -> int:
    """Print how two recordings compare; returns the exit status."""
    if problem := obstacle(old, new):
        print(f"error: the recordings were {problem}. Record both again, here.", file=sys.stderr)
        return 2
    lines, count = report(old, new)
    print("\n".join(lines))
    print(f"{count} of {len(lines)} runs differ")
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main())
