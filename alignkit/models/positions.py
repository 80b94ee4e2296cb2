"""How many positions a model has, whatever its config calls them; without torch, so that configs can be checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

STATED = "max_position_embeddings"
OTHER_NAMES = ("n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "model_max_length")
"""What families call it that have no ``max_position_embeddings``: GPT-2 and its kin, DBRX and MPT, Kimi Linear. The
``context_length`` of recurrent models is none of them: these have no positions that could run out."""

LEARNED_POSITIONS = frozenset(("gpt2", "gpt_bigcode", "openai-gpt", "gpt_neo", "opt", "biogpt"))
"""Model types whose positions are rows of a table, which ends; a rotary model may go beyond what its config states."""


def stated_positions(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The key that states the number of positions and its value, or None where the config states none.

    Args:
        config: Content of a ``config.json``, or of its text model's part.
    """
    settings = _of_text(config)
    for key in (STATED, *OTHER_NAMES):
        value = settings.get(key)
        if isinstance(value, int) and value > 0:
            return key, value
    return None


def positions_of(config: Any) -> int | None:
    """Positions of a loaded model, or None where they are not limited.

    Args:
        config: Its configuration, of transformers.
    """
    stated = stated_positions(config.get_text_config().to_dict())
    return None if stated is None else stated[1]


def is_stretched(config: Mapping[str, Any]) -> bool:
    """Whether the rotary embedding is scaled, so that the stated number of positions may not be the limit.

    Args:
        config: Content of a ``config.json``.
    """
    settings = _of_text(config)
    return '"factor"' in json.dumps([settings.get("rope_scaling"), settings.get("rope_parameters")])


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the text model, in the config of a model of several."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
