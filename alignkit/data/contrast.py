"""The prompts of contrastive prompting: "make this response better" and "make it worse" (T-REG, arXiv 2412.02685).

The templates are data, ``contrast_prompts.yaml`` beside this file, which a user may replace. Their wording is ours: of
the paper's only the intent is known, a revision towards helpful, correct, coherent and concise, against unhelpful,
incorrect, incoherent and verbose.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import ConfigError
from alignkit.yaml_text import parse_yaml

DEFAULT_FILE = Path(__file__).with_name("contrast_prompts.yaml")
VERSION = 1

_SIDES = ("better", "worse")
_PLACEHOLDERS = {"with_response": {"prompt", "response"}, "without_response": {"prompt"}}
_ENDING = "plain_text_ending"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class ContrastPrompts:
    """The two templates in use.

    Attributes:
        better, worse: Texts with ``{prompt}`` and, with ``include_response``, ``{response}``.
        include_response: Whether the response judged is part of its prompts; without it all responses share them.
        plain_text_ending: What follows the template where rows are plain text.
    """

    better: str
    worse: str
    include_response: bool
    plain_text_ending: str

    def prompts(self, prompt: Any, completions: Sequence[Any]) -> list[Any]:
        """The prompts of one row: for every completion its better one, then the worse ones; one of each without it.

        Args:
            prompt: Text, or messages.
            completions: Texts, or messages, like the prompt.

        Returns:
            Texts or messages, like the prompt.
        """
        responses = [_text_of(completion) for completion in completions] if self.include_response else [""]
        return [self._fill(template, prompt, text) for template in (self.better, self.worse) for text in responses]

    def _fill(self, template: str, prompt: Any, response: str) -> Any:
        if isinstance(prompt, str):
            return _substitute(template, prompt, response) + self.plain_text_ending
        # What comes before the request stays, above all a system message. After anything but a user's message there is
        # nothing to replace, and the revision is one message more.
        ends_in_request = prompt[-1]["role"] == "user"
        requests = [message for message in prompt if message["role"] == "user"] or prompt[-1:]
        text = _substitute(template, _text_of(requests[-1:]), response)
        return [*(prompt[:-1] if ends_in_request else prompt), {"role": "user", "content": text}]


def load_contrast_prompts(path: Path | None = None, *, include_response: bool = True) -> ContrastPrompts:
    """Read a template file.

    Args:
        path: A file like ``contrast_prompts.yaml`` beside this module, or None for that one.
        include_response: Take the templates ``with_response``, or those ``without_response``.

    Raises:
        ConfigError: There is no such file, or its content is not what it must be; every problem.
    """
    path = path or DEFAULT_FILE
    name = f"contrast prompts {path}"
    if not path.is_file():
        raise ConfigError(name, ["there is no such file"])
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(name, [f"is not YAML in UTF-8: {' '.join(str(error).split())}"]) from error
    if problems := _problems(content):
        raise ConfigError(name, [f"{problem}. Compare with {DEFAULT_FILE.name} of alignkit" for problem in problems])
    chosen = content["with_response" if include_response else "without_response"]
    return ContrastPrompts(chosen["better"], chosen["worse"], include_response, content[_ENDING])


def _problems(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return [f"holds {type(content).__name__}, expected the keys version, {', '.join(_PLACEHOLDERS)}, {_ENDING}"]
    if content.get("version") != VERSION:
        return [f"version is {content.get('version')!r:.60}; this alignkit reads version {VERSION}"]
    known = {"version", *_PLACEHOLDERS, _ENDING}
    problems = [f"unknown key {key!r}" for key in content if key not in known]
    if not isinstance(content.get(_ENDING), str):
        problems.append(f"{_ENDING} is missing or not text (it may be empty)")
    for group, names in _PLACEHOLDERS.items():
        templates = content.get(group)
        if not isinstance(templates, dict) or set(templates) != set(_SIDES):
            problems.append(f"{group} must hold exactly the keys {' and '.join(_SIDES)}")
            continue
        for side in _SIDES:
            problems += _template_problems(f"{group}.{side}", templates[side], names)
    return problems


def _template_problems(key: str, template: Any, names: set[str]) -> list[str]:
    if not isinstance(template, str):
        return [f"{key} is {type(template).__name__}, expected text"]
    found = set(_PLACEHOLDER.findall(template))
    missing = [f"{key} lacks {{{name}}}" for name in sorted(names - found)]
    return missing + [f"{key} has an unknown placeholder {{{name}}}" for name in sorted(found - names)]


def _substitute(template: str, prompt: str, response: str) -> str:
    """Fill both placeholders at once, so that braces in a prompt or a response stay what they are."""
    values = {"prompt": prompt, "response": response}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _text_of(value: Any) -> str:
    """A text as it is; messages as the text of their contents and tool calls, those of several below one another."""
    if isinstance(value, str):
        return value
    return "\n\n".join(part for message in value for part in _parts(message) if part)


def _parts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    calls = message.get("tool_calls")
    return [*texts, *([json.dumps(calls, ensure_ascii=False)] if calls else [])]
