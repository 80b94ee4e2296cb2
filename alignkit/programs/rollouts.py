"""Make the page on which the completions of an online run are read, each beside its rewards.

    alignkit rollouts runs/first

Writes rollouts.html into the run directory, from the files that training leaves in its folder rollouts/ every
`rollout_steps` steps. A run does it at its end; this does it while a run is going on, or after one that was stopped.
The page asks for nothing elsewhere and opens from disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignkit.errors import ConfigError
from alignkit.programs.arguments import StrictParser


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the page of a run."""
    parser = command_line(prog)
    run: Path = parser.parse(words).run

    # pyarrow is imported here, once the command line is known to be right.
    from alignkit.reports.rollouts import write_page
    from alignkit.storage.manifest import RUN_FILE

    if not (run / RUN_FILE).is_file():
        raise ConfigError(parser.prog, [f"{run} is no run directory: it holds no {RUN_FILE}. Write an output_dir"])
    page = write_page(run)
    if page is None:
        why = "holds no rollouts: no online run wrote it, or one with rollout_steps: 0, or before its first step"
        raise ConfigError(parser.prog, [f"{run} {why}"])
    print(f"written: {page}")


def command_line(prog: str | None = None) -> StrictParser:
    """The options; ``prog`` as for :class:`~alignkit.programs.arguments.StrictParser`."""
    parser = StrictParser(*__doc__.split("\n\n", 1), prog=prog)
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of an online run")
    return parser
