"""The tokens of a conversation that the assistant wrote, in any chat template.

A template that marks them with ``{% generation %}`` says it itself. Another one that marks them may stand in for the
marks alone, in conversations that both write alike, letter for letter. Where neither helps, the messages are rendered
turn by turn. A turn begins where the template opens it after the messages before it, and ends where the text of the
messages up to it ends, so that its stop token is part of it. It is trained if the whole conversation shows it so:

- the tokens of the messages up to it are the beginning of the tokens of all of them;
- so is the text of the messages before it, and it begins where the opened turn and the whole text part.

The last turn of the assistant, behind which nothing is kept, ends with the text. An earlier one may be written
otherwise once more follows (Qwen3 takes the thoughts out); what the model would learn there is nothing it is to write.

Where marks, or the text of a turn, end just before a stop token, it is trained too: no answer ends without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from alignkit.data.conversion import common_prefix_length
from alignkit.data.problems import Problem
from alignkit.data.rendering import Messages, RenderingError, render, render_marked
from alignkit.data.tokenization import rendered_ids, template_arguments

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Encoded(NamedTuple):
    """A tokenised text.

    Attributes:
        ids: Its tokens.
        is_trained: Which of them are trained, 1 or 0.
        num_turns, num_turns_left: Turns of the assistant, and those of them that are not trained, where they are
            told apart.
    """

    ids: list[int]
    is_trained: list[int]
    num_turns: int = 0
    num_turns_left: int = 0


class Turns(NamedTuple):
    """A rendered conversation.

    Attributes:
        whole: Its text.
        bounds: Of each turn the beginning of that text behind which it stands, and the text of the messages up to it,
            which may be another one than the beginning of the whole.
        num_turns: Turns of the assistant.
    """

    whole: str
    bounds: list[tuple[str, str]]
    num_turns: int

    @property
    def texts(self) -> list[str]:
        """All that is to be tokenised: the whole text, and of each turn the text before it and with it."""
        return [self.whole, *(text for pair in self.bounds for text in pair)]


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template marks what the assistant writes, and the tokenizer can tell which tokens these are."""
    template = tokenizer.chat_template
    # Named templates: what renders messages without tools is the default one.
    template = template.get("default", "") if isinstance(template, Mapping) else template or ""
    return tokenizer.is_fast and _MARK.search(template) is not None


def encode_turns(
    conversations: Sequence[Messages],
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
    *,
    stop_token_ids: Collection[int],
    part: str,
) -> list[Encoded | Problem]:
    """Token ids of conversations, and a mask of the assistant's turns.

    Args:
        conversations: Lists of messages.
        rows: The rows they are of, which may hold arguments of the chat template.
        chat_template: Another template, which marks the turns; None where none is known.
        stop_token_ids: Ids at which generation stops.
        part: What the messages are called in a problem.

    Returns:
        For each conversation ids and mask, or why the chat template cannot render it.
    """
    found: list[Encoded | Turns | Problem] = []
    for messages, row in zip(conversations, rows, strict=True):
        try:
            found.append(_encoded_or_turns(messages, tokenizer, template_arguments(row), chat_template, part))
        except RenderingError as error:
            found.append(error.problem)
    # One call for all texts is what makes this fast.
    texts = [text for each in found if isinstance(each, Turns) for text in each.texts]
    ids = iter(rendered_ids(texts, tokenizer) if texts else [])
    encoded = [
        _marked(list(islice(ids, len(each.texts))), each.num_turns) if isinstance(each, Turns) else each
        for each in found
    ]
    return [_with_stops(each, stop_token_ids) if isinstance(each, Encoded) else each for each in encoded]


def _encoded_or_turns(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any],
    chat_template: str | None,
    part: str,
) -> Encoded | Turns:
    """The conversation by the marks of a template, or in turns where none fits."""
    num_turns = sum(message["role"] == "assistant" for message in messages)
    if chat_template is None and has_marks(tokenizer):
        return Encoded(*render_marked(messages, tokenizer, arguments, part=part), num_turns)
    if chat_template is not None and tokenizer.is_fast:
        own = render(messages, tokenizer, arguments, part=part)
        try:
            other = render(messages, tokenizer, arguments, part=part, chat_template=chat_template)
        except RenderingError:
            other = None
        if other == own:
            marked = render_marked(messages, tokenizer, arguments, part=part, chat_template=chat_template)
            return Encoded(*marked, num_turns)
    return _turns(messages, tokenizer, arguments, part)


def _turns(messages: Messages, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], part: str) -> Turns:
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    whole = render(messages, tokenizer, arguments, part=part)
    kept = messages[: places[-1] + 1] if places else messages
    if len(kept) < len(messages):
        # Nothing behind the last answer is trained, and nothing before it sees that.
        whole = render(kept, tokenizer, arguments, part=part)
    bounds = []
    # Before the first message nothing can be rendered, so that nobody knows where it begins.
    for index in filter(None, places):
        try:
            opened = _opened(kept[:index], whole, tokenizer, arguments)
            closed = whole if index == places[-1] else render(kept[: index + 1], tokenizer, arguments, part=part)
        except RenderingError:
            # A template may refuse half a conversation; what it refuses, it does not show.
            continue
        if opened is not None:
            bounds.append((opened, closed))
    return Turns(whole, bounds, len(places))


def _opened(
    before: Messages, whole: str, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> str | None:
    """The beginning of the whole text at which the turn after some messages begins; None where it cannot be told."""
    opened = render(before, tokenizer, arguments, part="messages", add_generation_prompt=True)
    shared = os.path.commonprefix([opened, whole])
    # An opening may say more than the answer shows, such as a thought to be filled in; never less than what is before.
    if shared == opened or shared.startswith(render(before, tokenizer, arguments, part="messages")):
        return shared
    return None


def _marked(ids: Sequence[list[int]], num_turns: int) -> Encoded:
    """The mask of a conversation from the ids of :attr:`Turns.texts`."""
    whole, *bounds = ids
    mask, num_trained = [0] * len(whole), 0
    for opened, closed in zip(bounds[::2], bounds[1::2], strict=True):
        if whole[: len(closed)] != closed:
            # Written otherwise now that more follows.
            continue
        start = common_prefix_length(opened, closed)
        mask[start : len(closed)] = [1] * (len(closed) - start)
        num_trained += 1
    return Encoded(whole, mask, num_turns, num_turns - num_trained)


def _with_stops(encoded: Encoded, stop_token_ids: Collection[int]) -> Encoded:
    """The same with every stop token trained that stands behind a trained token."""
    mask = list(encoded.is_trained)
    for place, token in enumerate(encoded.ids):
        if token in stop_token_ids and place and encoded.is_trained[place - 1]:
            mask[place] = 1
    return encoded._replace(is_trained=mask)
