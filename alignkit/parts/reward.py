"""What a reward is: options, a score of one completion, the columns it reads.

A reward is plain Python: it needs neither torch nor a trainer, so that it can be tested on a line of text, sent to
another process, and given to any trainer that takes functions of the form of TRL's.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from alignkit.errors import RewardError
from alignkit.parts.discovery import names_in

PACKAGE = "alignkit.rewards"


@dataclass(frozen=True)
class Sample:
    """One completion, with what a reward may look at.

    Attributes:
        prompt: A text, or messages.
        text: What the model wrote; of messages, the last one that the assistant wrote.
        token_ids: The tokens of the completion, empty where the caller has none.
        row: The other columns of the row, by name.
    """

    prompt: Any
    text: str
    token_ids: Sequence[int]
    row: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A reward function; a subclass has options as fields, made by :func:`~alignkit.parts.options.option`.

    Called with lists, it returns a list: ``reward(prompts=..., completions=..., completion_ids=..., answer=...)``.
    ``None`` in it stands for a completion that this reward does not judge, such as one whose row has no reference.
    Fields are plain values, so that a reward can be pickled.

    Attributes:
        name: What a run calls it; TRL logs it as ``rewards/<name>/mean``.
        summary: One sentence.
        fidelity: Where the formula is from, and what is ours.
        weight: Its weight in the sum where a run names none.
        counts_tokens: Whether it reads ``completion_ids``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    fidelity: ClassVar[str]
    weight: ClassVar[float] = 1.0
    counts_tokens: ClassVar[bool] = False

    @property
    def __name__(self) -> str:
        """The name, where a function has one."""
        return self.name

    def columns(self) -> tuple[str, ...]:
        """Columns of the data that it reads under its options, beside the prompt."""
        return ()

    def score(self, sample: Sample) -> float | None:
        """The reward of one completion; whatever text it holds, this raises nothing.

        Args:
            sample: The completion.
        """
        raise NotImplementedError

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """The rewards of a batch; a reward that is cheaper for many at once has its own.

        Args:
            samples: The completions.
        """
        return [self.score(sample) for sample in samples]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The rewards of a batch, one a completion.

        Args:
            prompts: Texts, or lists of messages.
            completions: Texts, or lists of messages.
            completion_ids: Their tokens.
            **columns: A list a column of the data; whatever else a trainer passes is not looked at.

        Raises:
            RewardError: A column it reads is missing, or the tokens are.
        """
        wanted = self.columns()
        if missing := [name for name in wanted if name not in columns]:
            raise RewardError(f"The reward {self.name!r} reads the column {missing[0]!r}, which the rows do not have.")
        if self.counts_tokens and completion_ids is None:
            raise RewardError(f"The reward {self.name!r} counts tokens: pass completion_ids, a list a completion.")
        ids: Sequence[Sequence[int]] = [()] * len(completions) if completion_ids is None else completion_ids
        samples = [
            Sample(prompt, completion_text(completion), tokens, {key: columns[key][i] for key in wanted})
            for i, (prompt, completion, tokens) in enumerate(zip(prompts, completions, ids, strict=True))
        ]
        return self.scores(samples)


def completion_text(completion: Any) -> str:
    """What the model wrote last: a text itself, or the content of the last message that the assistant wrote.

    Args:
        completion: A text, or messages; a content may be a list of parts, whose texts are joined.
    """
    if isinstance(completion, str):
        return completion
    written = [message for message in completion if message.get("role") == "assistant"]
    return _content(written[-1].get("content")) if written else ""


def prompt_text(prompt: Any) -> str:
    """What was asked: a text itself, or the content of the last message that the user wrote.

    Args:
        prompt: A text, or messages.
    """
    if isinstance(prompt, str):
        return prompt
    asked = [message for message in prompt if message.get("role") == "user"]
    return _content(asked[-1].get("content")) if asked else ""


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content if isinstance(content, str) else ""


def rewards_by_name() -> dict[str, type[Reward]]:
    """Every reward by its name, from ``REWARDS`` of the files in ``alignkit/rewards`` (helpers left out)."""
    families = [importlib.import_module(f"{PACKAGE}.{family}") for family in names_in(PACKAGE)]
    return {reward.name: reward for family in families for reward in family.REWARDS}


def reward_names() -> list[str]:
    """Names of all rewards, in the order of the alphabet."""
    return sorted(rewards_by_name())


def load_reward(name: str) -> type[Reward]:
    """The class of the reward called ``name``; raises KeyError for an unknown one."""
    return rewards_by_name()[name]
