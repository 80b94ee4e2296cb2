"""Messages to text through the chat template, with the row, the message and the reason where it cannot be done.

What a template makes of messages is what ``apply_chat_template`` of transformers gives, unless that would train a model
on something the row does not say:

- content in parts (``[{"type": "text", "text": ...}]``) that the template does not know, and so writes as Python, as
  nothing, or with an error: the texts of the parts, one behind the other, take its place;
- arguments of a tool call that are JSON text, as OpenAI writes them, in a template that would write that text as JSON
  once more: what the text says takes its place;
- a role the template does not know, tool calls or tools it does not write: they would be missing, which is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.bounded import TEMPLATE_ERRORS
from alignkit.data.problems import Problem, content_text, is_blank, shorten
from alignkit.json_text import parse_json

ROLES = frozenset({"system", "user", "assistant", "tool"})
"""Roles that templates know; what one leaves out of them, a system turn say, it leaves out on purpose."""
_KNOWN_AS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}

Messages = Sequence[Mapping[str, Any]]

_NO_TOOLS = (
    "the chat template leaves out the tools, so the model would be trained without knowing them. Set chat_template to "
    "a jinja file that writes them, take a model whose template does, or leave the column tools out"
)


class RenderingError(Exception):
    """The chat template cannot render a row; ``problem`` says which message and why."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.kind)


def render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any],
    *,
    part: str,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text that a chat template makes of messages.

    Args:
        messages: Messages that :func:`~alignkit.data.problems.value_problems` finds nothing wrong with.
        arguments: Arguments of the template that the row brings, ``tools`` among them.
        part: What the messages are called in an error, say ``prompt + chosen``.
        chat_template: A template in place of the tokenizer's.
        add_generation_prompt: Open the turn of the assistant at the end.

    Raises:
        RenderingError: The template refuses the messages, or leaves one of them out.
    """
    how = {"chat_template": chat_template, "add_generation_prompt": add_generation_prompt, **arguments}
    messages = renderable(messages, tokenizer, how)
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except TEMPLATE_ERRORS as error:
        raise RenderingError(_refusal(messages, tokenizer, how, part, error)) from error
    for index, message in enumerate(messages):
        if not _is_simple(message) and (why := _left_out(message, text)):
            raise RenderingError(Problem(why, _place(index, message, part)))
    if how.get("tools") and _leaves_out_tools(messages, tokenizer, how, text):
        raise RenderingError(Problem(_NO_TOOLS, f"{part}: {shorten(how['tools'])}"))
    return text


def render_marked(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Mapping[str, Any],
    *,
    part: str,
    chat_template: str | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of messages, and a mask of the assistant's turns as the template marks them.

    Args:
        messages: As in :func:`render`.
        arguments: As there.
        part: As there.
        chat_template: A template in place of the tokenizer's.

    Raises:
        RenderingError: The template refuses the messages, or leaves one of them out.
    """
    how = {"chat_template": chat_template, **arguments}
    if how.get("tools") or not all(map(_is_simple, messages)):
        render(messages, tokenizer, arguments, part=part, chat_template=chat_template)
        messages = renderable(messages, tokenizer, how)
    marks = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        encoded = tokenizer.apply_chat_template(messages, **marks, **how)
    except TEMPLATE_ERRORS as error:
        raise RenderingError(_refusal(messages, tokenizer, how, part, error)) from error
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def renderable(messages: Messages, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any]) -> Messages:
    """The messages as the template can render them: parts of content and arguments of calls changed where they must be.

    Args:
        how: Further arguments of ``apply_chat_template``.
    """
    return _with_joined_parts(_with_parsed_calls(messages, tokenizer, how), tokenizer, how)


def _with_parsed_calls(messages: Messages, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any]) -> Messages:
    """The messages with the arguments of tool calls as objects, where the template would quote their text, or fails."""
    texts = [text for message in messages for text in map(_argument_text, message.get("tool_calls") or ()) if text]
    if not texts:
        return messages
    try:
        as_given = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except TEMPLATE_ERRORS:
        as_given = None
    quoted = [json.dumps(text, ensure_ascii=is_ascii) for text in texts for is_ascii in (True, False)]
    if as_given is not None and not any(text in as_given for text in quoted):
        return messages
    calls = [message.get("tool_calls") for message in messages]
    return [
        {**message, "tool_calls": list(map(_parsed_call, made))} if made else message
        for message, made in zip(messages, calls, strict=True)
    ]


def _argument_text(call: Any) -> str | None:
    """The arguments of a tool call where they are a text that holds a JSON object, else None."""
    called = call.get("function", call) if isinstance(call, Mapping) else None
    text = called.get("arguments") if isinstance(called, Mapping) else None
    if not isinstance(text, str):
        return None
    try:
        return text if isinstance(parse_json(text), dict) else None
    except ValueError:
        return None


def _parsed_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    text = _argument_text(call)
    if text is None:
        return call
    if "function" in call:
        return {**call, "function": {**call["function"], "arguments": parse_json(text)}}
    return {**call, "arguments": parse_json(text)}


def _with_joined_parts(messages: Messages, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any]) -> Messages:
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    joined = [
        {**message, "content": content_text(message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    plain = tokenizer.apply_chat_template
    try:
        as_given = plain(messages, tokenize=False, **how)
    except TEMPLATE_ERRORS:
        return joined
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if any(str(content) in as_given for content in contents):
        return joined
    texts = [part["text"].strip() for content in contents for part in content if isinstance(part, Mapping)]
    if all(text in as_given for text in texts):
        return messages
    try:
        as_joined = plain(joined, tokenize=False, **how)
    except TEMPLATE_ERRORS:
        return messages
    # A template may drop text on purpose, as some do with earlier thoughts; it then does so in both.
    return joined if any(text in as_joined and text not in as_given for text in texts) else messages


def _is_simple(message: Mapping[str, Any]) -> bool:
    """Whether a message is one that every template writes: a text by one of the usual roles."""
    return isinstance(message.get("content"), str) and message["role"] in ROLES and not message.get("tool_calls")


def _refusal(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any], part: str, error: Exception
) -> Problem:
    """What the error of a template says, and of which message: the first from which on it does not go away."""
    reason = " ".join(str(error).split())
    shorter = {**how, "add_generation_prompt": False}
    index = len(messages) - 1
    while index and _error_of(messages[:index], tokenizer, shorter) == reason:
        index -= 1
    message = messages[index]
    advice = "Change the message, or set chat_template to a jinja file that takes it"
    if message.get("content") is None:
        advice = 'Its content is null: write "", or set chat_template to a jinja file that takes tool calls'
    kind = f"the chat template cannot render a message: {reason}. {advice}"
    return Problem(kind, _place(index, message, part))


def _error_of(messages: Messages, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any]) -> str | None:
    try:
        tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except TEMPLATE_ERRORS as error:
        return " ".join(str(error).split())
    return None


def _left_out(message: Mapping[str, Any], text: str) -> str | None:
    """Why a rendered text does not say what a message says, or None."""
    role, calls = message["role"], message.get("tool_calls")
    if role not in ROLES and content_text(message.get("content")).strip() not in text:
        known = _KNOWN_AS.get(role.lower())
        advice = f"write {known!r}" if known else f"roles that templates know are {', '.join(sorted(ROLES))}"
        return f"the chat template leaves out messages of role {role!r}: {advice}"
    if calls and is_blank(content_text(message.get("content"))) and not any(_name_of(call) in text for call in calls):
        advice = "Set chat_template to a jinja file that does, or leave these rows out"
        return f"the chat template does not write tool calls, so nothing is left of the message. {advice}"
    return None


def _leaves_out_tools(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, how: Mapping[str, Any], text: str
) -> bool:
    """Whether a rendered text says nothing of the tools."""
    if _takes_tools(tokenizer, how.get("chat_template"), str(tokenizer.chat_template)):
        return False
    try:
        return text == tokenizer.apply_chat_template(messages, tokenize=False, **{**how, "tools": None})
    except TEMPLATE_ERRORS:
        return False


@lru_cache(maxsize=8)
def _takes_tools(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, own: str) -> bool:
    """Whether a template writes the name of a tool; ``own``, the tokenizer's, is there to tell its templates apart."""
    name = "alignkit_probe"
    about = {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}}
    given = {"tools": [{"type": "function", "function": about}], "chat_template": chat_template}
    try:
        return name in tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, **given)
    except TEMPLATE_ERRORS:
        return False


def _name_of(call: Any) -> str:
    """The name of the function that a tool call calls; the empty text, which any text holds, where it has none."""
    called = call.get("function", call) if isinstance(call, Mapping) else {}
    return str(called.get("name", "")) if isinstance(called, Mapping) else ""


def _place(index: int, message: Mapping[str, Any], part: str) -> str:
    return f"message {index} of {part}, role {message['role']!r}: {shorten(message.get('content'))}"
