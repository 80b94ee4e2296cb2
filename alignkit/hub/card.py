"""The card of what is published: does its metadata hold on another machine, and what must change so that it does?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from alignkit.errors import ModelError
from alignkit.models.adapter_config import LEFT_OUT_BY_ENGINES
from alignkit.models.card_file import read_card
from alignkit.models.files import ADAPTER_CONFIG, read_json
from alignkit.models.fingerprints import BaseFingerprint, base_fingerprint, read_origin
from alignkit.reports.card import hub_id

CARD = "README.md"
LIBRARIES = {"adapter": "peft", "model": "transformers"}
Kind = Literal["adapter", "model"]


@dataclass(frozen=True)
class CardCopy:
    """The card in the form that is sent to the Hub.

    Attributes:
        metadata: Its metadata.
        replacements: Files sent with another content than they have here, by name.
        notes: What was changed, for the user.
        problems: Why it cannot be sent, each with the way out; empty when it can.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    replacements: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def prepare_card(root: Path, kind: Kind, base_model: str | None) -> CardCopy:
    """Check the card of a directory and name its base as the Hub knows it.

    Args:
        root: The directory.
        kind: ``adapter`` or ``model``.
        base_model: Hub id of the base, or None to take the one that card or adapter config names.
    """
    if not (root / CARD).is_file():
        return CardCopy(problems=[f"there is no {CARD}: add a model card (trainings and merges write one)"])
    try:
        card = read_card(root / CARD)
    except ModelError as error:
        return CardCopy(problems=[str(error)])
    copy = CardCopy()
    config = read_json(root / ADAPTER_CONFIG) if kind == "adapter" else {}
    trained_on = config.get("base_model_name_or_path")
    base = _hub_base(base_model, card.data.base_model, trained_on)
    if base is None and kind == "adapter":
        copy.problems.append(no_base(card.data.base_model or trained_on))
    if kind == "adapter" and base is not None:
        _compare_base(root, base, config.get("revision"), copy)
    if base is not None:
        _name_base(card, base, trained_on, copy)
    if config.get("target_parameters"):
        _say_what_engines_leave_out(card, copy)
    if kind == "adapter" and base is not None and trained_on != base:
        copy.replacements[ADAPTER_CONFIG] = json.dumps({**config, "base_model_name_or_path": base}, indent=2).encode()
        copy.notes.append(f"{ADAPTER_CONFIG}: the copy sent names the base {base} instead of {trained_on!r}")
    copy.metadata.update(card.data.to_dict())
    copy.problems.extend(_metadata_problems(copy.metadata, kind))
    return copy


def _compare_base(root: Path, base: str, revision: str | None, copy: CardCopy) -> None:
    """Compare the base named with the one the adapter was trained on, as far as both are known here."""
    origin = read_origin(root)
    if origin is None:
        return
    try:
        found = base_fingerprint(base, revision, local_files_only=True)
    except (OSError, ValueError):
        copy.notes.append(
            f"{base} is not on this machine: not checked whether it is the base the adapter was trained on"
        )
        return
    if differences := BaseFingerprint(**origin["base"]).differences(found):
        problem = f"the adapter was trained on another base than {base}: {'; '.join(differences)}"
        copy.problems.append(f"{problem}. Give the Hub id of the base it was trained on with --base_model")


def id_fault(name: str) -> str | None:
    """Why a name cannot be a Hub id, or None.

    Args:
        name: Such as ``owner/name``.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return f"{name!r} is no Hub id: {error}"
    return None


def _hub_base(given: str | None, in_card: str | list[str] | None, trained_on: str | None) -> str | None:
    """The first of the names that stands for a repository of the Hub."""
    named = [in_card] if isinstance(in_card, str) else in_card or []
    return next((found for name in (given, *named, trained_on) if name and (found := hub_id(name))), None)


def _name_base(card: ModelCard, base: str, trained_on: str | None, copy: CardCopy) -> None:
    """Let the card name ``base`` wherever it names a base on this machine, in its metadata and its examples."""
    before = str(card)
    named = card.data.base_model
    local = {name for name in (named, trained_on) if isinstance(name, str) and hub_id(name) != name}
    if not isinstance(named, list):
        card.data.base_model = base
    # The Hub derives these from base_model; PEFT writes them with local paths.
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")] or None
    for name in local:
        for quote in ('"', "'", "`"):
            card.text = card.text.replace(f"{quote}{name}{quote}", f"{quote}{base}{quote}")
    if str(card) != before:
        copy.replacements[CARD] = str(card).encode()
        copy.notes.append(f"{CARD}: the copy sent names the base {base}")


def _say_what_engines_leave_out(card: ModelCard, copy: CardCopy) -> None:
    """Let the card, and whoever publishes it, know that engines may serve the adapter as the base."""
    copy.notes.append(LEFT_OUT_BY_ENGINES)
    if LEFT_OUT_BY_ENGINES not in card.text:
        card.text = f"{card.text.rstrip()}\n\n## Serving\n\n{LEFT_OUT_BY_ENGINES}\n"
        copy.replacements[CARD] = str(card).encode()
        copy.notes.append(f"{CARD}: the copy sent says so")


def _metadata_problems(metadata: dict[str, Any], kind: Kind) -> Iterator[str]:
    """What the Hub would refuse or misread."""
    library, given = LIBRARIES[kind], metadata.get("library_name")
    if given != library:
        yield f"{CARD} says library_name: {given}; write library_name: {library}, by which the Hub shows how to load it"
    for key in ("base_model", "datasets"):
        # An adapter without a base on the Hub has been reported, with a way out of its own.
        if key == "base_model" and kind == "adapter":
            continue
        value = metadata.get(key) or []
        for name in [value] if isinstance(value, str) else value:
            if hub_id(name) != name:
                reason = id_fault(name) or "a place on this machine"
                yield f"{CARD} says {key}: {name} ({reason}); write a Hub id, or remove the key"
    for key, kinds in (("license", str), ("pipeline_tag", str), ("tags", list)):
        if key in metadata and not isinstance(metadata[key], kinds):
            yield f"{CARD} says {key}: {metadata[key]!r}; expected {'text' if kinds is str else 'a list'}"


def no_base(given: str | list[str] | None, *, option: str = "--base_model") -> str:
    """What to say of an adapter whose base is not on the Hub.

    Args:
        given: How card or config name the base, if they do.
        option: Where the Hub id of the base can be given: of an upload, or the config key of a training.
    """
    what = f"{given!r} as base model, which is not on the Hub" if given else "no base model"
    return (
        f"the adapter names {what}: nobody else could load it. Give the Hub id of the base with {option}. Where "
        "the base is not on the Hub, publish it first, or merge the adapter (alignkit merge) and publish that"
    )
