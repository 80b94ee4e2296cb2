"""Text that may be shown and kept: without the secrets that somebody wrote into it, and with nothing invisible in it.

A token in a config, a URL or an option must not come back in a message, in ``run.json``, in a card or in a log. A
control character of a row must not reach a terminal, which would obey it. Both are done where text leaves: in every
error, in everything a program prints, in what is recorded of a run.
"""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO, cast

HIDDEN = "***"
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Variables whose value is hidden wherever it stands."""
_SHORTEST = 8
"""A shorter value would hide words that are no secret."""
_NAMES = (
    r"hub_token|hf_token|use_auth_token|auth_token|access_token|api_token|api_key|wandb_api_key|secret_key|password"
)
_VALUE = r"(?!null\b|None\b|\.\.\.)[^\s\"'`,;}\]]+"

_PATTERNS = (
    # The tokens of Hugging Face, GitHub, OpenAI, Slack and AWS, by their beginnings.
    re.compile(r"\b(hf_|api_org_)[A-Za-z0-9]{16,}"),
    re.compile(r"\b(gh[opsur]_|github_pat_)\w{16,}"),
    re.compile(r"\b(sk-)[\w-]{20,}"),
    re.compile(r"\b(xox[abeprs]-)[\w-]{10,}"),
    re.compile(r"\b((?:AKIA|ASIA))[A-Z0-9]{16}\b"),
    # scheme://user:password@host; a path has one slash of them.
    re.compile(r"(\w:/{1,2})[^\s/@\"'`<>]+(?=@)"),
    # ?token=..., also as a key or an option: hub_token: ..., --api_key ...
    re.compile(r"([?&](?:[\w-]*(?:token|key|secret|signature|password|credential)|sig|auth)=)[^\s&#\"'`<>]+", re.I),
    re.compile(rf"((?:\b(?:{_NAMES})[\"']?|`token)\s*[:=]\s*[\"']?){_VALUE}", re.I),
    re.compile(rf"(--(?:{_NAMES}|token)[ =][\"']?){_VALUE}", re.I),
    re.compile(r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)?\s*)[^\s\"'`,;}\]]+", re.I),
    re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.I),
)
"""Each with what stays of a match."""

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and newline, what reorders text, and halves of characters, which no terminal can show."""
_MARKS = re.compile(r"[\\`*\[\]#~|!]|(?<!\w)_|_(?!\w)")
"""What Markdown reads as more than itself in a line of text."""


def without_secrets(text: str) -> str:
    """``text`` with ``***`` in place of tokens and passwords.

    Args:
        text: Anything that may hold some.
    """
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def all_without_secrets(value: Any) -> Any:
    """The same of every text in a JSON value; under a key that names a secret, of whatever stands there.

    Args:
        value: Mappings and lists of texts and numbers.
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(item, str) and re.fullmatch(_NAMES, str(key), re.I) else all_without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [all_without_secrets(item) for item in value]
    return value


def visible(text: str) -> str:
    r"""``text`` with control characters written out, such as ``\x1b``.

    Args:
        text: Anything; tabs and newlines stay.
    """
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text)


def markdown(text: str) -> str:
    """``text`` as words of a Markdown page: nothing in it is a link, a tag, a heading or a second line.

    Args:
        text: Such as the name of a folder.
    """
    line = " ".join(visible(text).split())
    return html.escape(_MARKS.sub(r"\\\g<0>", line), quote=False)


def markdown_code(text: str) -> str:
    """``text`` as code within a line of Markdown, between more backticks than it holds.

    Args:
        text: Such as a value of a config.
    """
    line = " ".join(visible(text).splitlines())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


class ShownText:
    """A stream on which everything is shown without secrets, and with control characters written out.

    Args:
        stream: Where it goes.
        redrawn: Whether progress bars are drawn there, which return to the beginning of a line and go up one.
    """

    def __init__(self, stream: TextIO, *, redrawn: bool) -> None:
        self._stream, self._redrawn = stream, redrawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; returns how many characters it has."""
        kept = re.split("(\r|\x1b\\[A)" if self._redrawn else "(\r(?=\n))", without_secrets(text))
        self._stream.write("".join(part if i % 2 else visible(part) for i, part in enumerate(kept)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)


def guard_streams() -> None:
    """Let everything this process prints from here on be shown safely."""
    if not isinstance(sys.stdout, ShownText):
        sys.stdout = cast(TextIO, ShownText(sys.stdout, redrawn=False))
    if not isinstance(sys.stderr, ShownText):
        sys.stderr = cast(TextIO, ShownText(sys.stderr, redrawn=True))
