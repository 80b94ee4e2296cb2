"""The card of a saved model or adapter, whose metadata anybody may have written."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from yaml import YAMLError

from alignkit.errors import ModelError
from alignkit.yaml_text import parse_yaml


def read_card(file: Path) -> ModelCard:
    """A card whose metadata can be used.

    Args:
        file: Its ``README.md``.

    Raises:
        ModelError: It is no text, or its metadata are no mapping, no YAML, or larger than anybody writes.
    """
    try:
        text = file.read_text(encoding="utf-8")
        block = REGEX_YAML_BLOCK.search(text)
        metadata = None if block is None else parse_yaml(block[2])
        if not isinstance(metadata, dict | None):
            raise ValueError(f"it holds {type(metadata).__name__}, expected `key: value` lines")
        tags = (metadata or {}).get("tags") or []
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ValueError(f"tags is {tags!r:.60}, expected a list of texts")
        return ModelCard(text)
    except (YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"the metadata of {file.name} is not valid: {reason} (folder {file.parent})") from error
