"""Talking to a model: turns that the chat template renders, answered as they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from alignkit.data.rendering import RenderingError, render
from alignkit.errors import ModelError
from alignkit.models.modes import evaluating
from alignkit.models.positions import positions_of
from alignkit.sampling.generation import (
    Sampling,
    forward_options,
    generation_config,
    own_settings_alone,
    stop_token_ids,
)


class Conversation:
    """One conversation with one model, which sees all turns so far.

    A model without a chat template knows no turns: each text is continued by itself.

    Args:
        model: A causal language model, plain or PEFT, on its device.
        tokenizer: Its tokenizer.
        sampling: How answers are drawn; may be replaced between turns.
        with_adapter: Whether a PEFT model answers with its adapter, or as its base.

    Attributes:
        messages: The turns so far.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        with_adapter: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.with_adapter = model, tokenizer, sampling, with_adapter
        self.messages: list[dict[str, str]] = []

    @property
    def has_template(self) -> bool:
        """Whether there are turns."""
        return self.tokenizer.chat_template is not None

    def begin(self, system: str | None = None) -> None:
        """Forget all turns.

        Args:
            system: What the conversation begins with instead.

        Raises:
            ModelError: The template takes no such message, or there is none.
        """
        if system is not None and not self.has_template:
            raise ModelError("a system message needs a chat template, which the tokenizer does not have")
        before, self.messages = self.messages, [] if system is None else [{"role": "system", "content": system}]
        try:
            if system is not None:
                self._token_ids("")
        except ModelError:
            self.messages = before
            raise

    def answer(self, text: str, write: Callable[[str], None] | None = None) -> str:
        """Say something and return the answer; both are turns from then on.

        Args:
            text: The turn of the user, or a text to continue.
            write: Is given the answer piece by piece, as it is drawn.

        Raises:
            ModelError: The template cannot render the turns, or they are longer than the model reads.
        """
        ids = self._token_ids(text)
        # Each turn has a seed of its own, so that the same question asked twice is answered twice.
        how = replace(
            self.sampling,
            max_new_tokens=int(min(self.sampling.max_new_tokens, self._room(len(ids)))),
            seed=self.sampling.seed + len(self.messages) // 2,
        )
        answer = self._drawn(ids, how, write)
        if self.has_template:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def _token_ids(self, text: str) -> list[int]:
        """What the model is given."""
        if not self.has_template:
            return list(self.tokenizer(text)["input_ids"])
        turns = [*self.messages, {"role": "user", "content": text}]
        try:
            rendered = render(turns, self.tokenizer, {}, part="conversation", add_generation_prompt=True)
        except RenderingError as error:
            raise ModelError(f"the chat template cannot render these turns: {error.problem.kind}") from error
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _room(self, length: int) -> float:
        """Tokens that the model has left for an answer."""
        limit = positions_of(self.model.config)
        if limit is None:
            return math.inf
        if length >= limit:
            raise ModelError(f"these turns have {length} tokens, and the model reads {limit}. Begin anew.")
        return limit - length

    @torch.no_grad()
    def _drawn(self, ids: list[int], how: Sampling, write: Callable[[str], None] | None) -> str:
        model, tokenizer = self.model, self.tokenizer
        device = model.device
        stops = stop_token_ids(model, tokenizer)
        inputs = torch.tensor([ids], device=device)
        streamer = None if write is None else _Pieces(tokenizer, write)
        devices = [device] if device.type == "cuda" else []
        with self._adapter(), evaluating(model), own_settings_alone(model), torch.random.fork_rng(devices):
            torch.manual_seed(how.seed)
            drawn = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=generation_config(how, stops, tokenizer),
                streamer=streamer,
                **forward_options(model),
            )
        return str(tokenizer.decode(drawn[0, len(ids) :], skip_special_tokens=True))

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        """The adapter off, where the base is to answer."""
        off = isinstance(self.model, PeftModel) and not self.with_adapter
        with self.model.disable_adapter() if off else nullcontext():
            yield


class _Pieces(TextStreamer):  # type: ignore[misc]  # transformers leaves it untyped
    """Hands text on as soon as no later token can change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers."""
        self.write(text)


def base_and_tuned(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    base: Any = None,
) -> dict[str, Conversation]:
    """Conversations with what was there before the training and after it, by name.

    Args:
        model: The model; with an adapter, its base is there as well.
        tokenizer: Of both.
        sampling: How answers are drawn.
        base: The base of a model without adapter, where it is to answer too.
    """
    tuned = Conversation(model, tokenizer, sampling)
    if isinstance(model, PeftModel):
        return {"base": Conversation(model, tokenizer, sampling, with_adapter=False), "tuned": tuned}
    return {"model": tuned} if base is None else {"base": Conversation(base, tokenizer, sampling), "tuned": tuned}
