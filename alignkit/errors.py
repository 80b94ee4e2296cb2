"""Errors meant to be read by the user.

Every error a program can foresee derives from :class:`AlignkitError`. Its message says what was given, why it cannot
work and what to write instead; the programs print it without a traceback and exit with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from alignkit.plain_text import visible, without_secrets

MOST_CHARACTERS = 4000
"""A longer message is cut in the middle: what it quotes may be of any length, such as the columns of a file."""
MOST_PROBLEMS = 50
"""Problems that one message lists."""


class AlignkitError(Exception):
    """Base of all errors whose message is complete without a traceback.

    Args:
        message: What to tell; tokens and passwords that were written into a value are hidden, control characters shown.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_shown(message))


class ProblemListError(AlignkitError):
    """Several problems found in one pass, reported together.

    Args:
        headline: One line naming what was checked.
        problems: One entry a problem, each self-contained.
    """

    def __init__(self, headline: str, problems: Sequence[str]) -> None:
        self.headline, self.problems = _shown(headline), [_shown(problem) for problem in problems]
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"  {i}. {p}" for i, p in enumerate(self.problems[:MOST_PROBLEMS], 1)]
        if (more := len(self.problems) - MOST_PROBLEMS) > 0:
            lines.append(f"  ... and {more:,} more")
        # Each part is shown as it may be; together they may be longer than one message.
        Exception.__init__(self, "\n".join([f"{self.headline}: {count}", *lines]))

    def __reduce__(self) -> tuple[type[ProblemListError], tuple[str, list[str]]]:
        """Survive the way back from a worker process."""
        return type(self), (self.headline, self.problems)


class ConfigError(ProblemListError):
    """The configuration cannot work; raised before torch is imported."""


class DataError(ProblemListError):
    """The data cannot be trained on; raised before a model is loaded."""


class RanksDifferError(ProblemListError):
    """The processes of a launch were not given the same; every one of them finds so and raises this."""


class LaunchError(AlignkitError):
    """Another process of the launch cannot be reached, has ended or does not answer."""


class ModelError(AlignkitError):
    """The model, adapter or tokenizer cannot be used as asked."""


class RewardError(AlignkitError):
    """A reward function raised, or returned what is no reward; names the reward, the row and the completion."""


class RunDirectoryError(AlignkitError):
    """The run directory cannot be created, reused or resumed."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop, as a scheduler or Ctrl-C does.

    Args:
        signal: Number of the signal; the exit status is 128 more, as a shell reports it.
        message: What to tell the user, such as the command that goes on.
    """

    def __init__(self, signal: int, message: str = "") -> None:
        self.signal = signal
        super().__init__(message)


class CheckpointError(AlignkitError):
    """A saved file is empty, truncated or not finite."""


def _shown(text: str) -> str:
    """A text as it may be printed: without secrets, nothing invisible in it, and of a length that somebody reads."""
    text = visible(without_secrets(text))
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
