"""The report on prompts: what was counted, why rows were dropped, what the rewards are given, and one prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignkit.data.columns import listed_columns
from alignkit.data.json_values import JsonValue
from alignkit.data.problems import Problem
from alignkit.data.prompts_tokens import encode_prompts
from alignkit.data.repeats import Content
from alignkit.data.split_report import Check, Spans, SplitReport
from alignkit.data.templates import check_rows

TOO_LONG = "prompt is longer than max_prompt_length"


@dataclass(frozen=True, kw_only=True)
class PromptReport(SplitReport):
    """The report on prompts; ``max_length`` is ``max_prompt_length``, and a longer prompt is dropped, never cut.

    Attributes:
        reward_columns: Columns that the reward functions are given.
        template: Arguments of the chat template that every prompt is rendered with.
        num_closed_prompts: Prompts kept that end in a stop token, so that nothing is left to be answered.
        closed_end: The end of such a prompt; an example.
    """

    trains_tokens: ClassVar[bool] = False
    looked_at: ClassVar[tuple[str, ...] | None] = ("prompt",)
    length_key: ClassVar[str] = "max_prompt_length"

    reward_columns: tuple[str, ...]
    template: Mapping[str, Any]
    num_closed_prompts: int
    closed_end: str

    def notes(self) -> list[str]:
        """What the rewards are given, and what nobody is."""
        return [f"columns for the rewards: {listed_columns(self.reward_columns) or 'none'}", *super().notes()]

    def checks(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> list[Check]:
        """Whether prompts fit, and whether the model is asked to answer."""
        *_, special_tokens = check_rows(self)
        return [self._check_length(), self._check_open(tokenizer, rows), special_tokens]

    def contents(self, table: pa.Table) -> Iterator[Content]:
        """The prompt of each row, which is what is learned from; messages without regard to the order of their keys."""
        for prompt in table["prompt"].to_pylist():
            value = JsonValue().decode_example(prompt) if isinstance(prompt, bytes) else prompt
            yield Content(b"", [json.dumps(value, sort_keys=True).encode()], [1.0])

    def example(self, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> RenderedPrompt:
        """A prompt as the model sees it, special tokens included."""
        (encoded,) = encode_prompts([row["prompt"]], tokenizer, self.template)
        if isinstance(encoded, Problem):
            raise ValueError(f"a prompt that was rendered before cannot be rendered: {encoded.kind}")
        return RenderedPrompt(tokenizer.decode(encoded.ids))

    def _check_length(self) -> Check:
        name = "prompts fit max_prompt_length"
        if not self.num_dropped:
            return Check(name, "ok", "all of them")
        found = f"{self.num_dropped} of {self.num_rows_in} rows are longer than {self.max_length} tokens and dropped"
        return Check(name, "warn", f"{found}; the longest has {self.lengths['prompt']['max']}")

    def _check_open(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]) -> Check:
        name = "the model is asked to answer"
        if self.num_closed_prompts:
            found = f"{self.num_closed_prompts} of {self.num_rows} prompts end in a stop token, {self.closed_end!r}"
            advice = "the template must open the assistant's turn where add_generation_prompt is set"
            if not self.conversational:
                advice = "take it out of the texts, or let the tokenizer add none (add_eos_token), or give messages"
            return Check(name, "fail", f"{found}, behind which a model writes at random: {advice}")
        if self.conversational and not all(self._opens_answer(row["prompt"], tokenizer) for row in rows):
            advice = "let the chat template open it where add_generation_prompt is set"
            return Check(name, "warn", f"the assistant's turn is not opened behind the user's: {advice}")
        return Check(name, "ok", "no prompt ends in a stop token")

    def _opens_answer(self, messages: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template writes anything behind the last message for the model to go on from."""
        plain, opened = (
            tokenizer.apply_chat_template(
                messages, tokenize=False, **{**self.template, "add_generation_prompt": is_opened}
            )
            for is_opened in (False, True)
        )
        return bool(plain != opened)


@dataclass(frozen=True)
class RenderedPrompt:
    """One prompt as the model sees it."""

    prompt: str

    def labelled(self) -> list[tuple[str, Spans]]:
        """The prompt as one part."""
        return [("prompt", [(self.prompt, False)])]
