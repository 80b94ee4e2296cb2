"""What may stand in the config of a saved adapter: it comes from anywhere, and PEFT takes it as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MOST_RANK = 65_536
MOST_LAYERS = 10_000
"""Ours: fifty times what the deepest models have, and built in seconds."""
LEFT_OUT_BY_ENGINES = (
    "PEFT and transformers load this adapter as it is. Engines that serve LoRA adapters are known to leave out what "
    "they have no place for, routers and experts of a mixture among it, and then answer as the base model does, "
    "without a word: for these make a plain model of it with `alignkit merge`."
)
"""What is said of an adapter on single parameters (``target_parameters``), which are such routers and experts."""
SPARSE_PREFIX, SPARSE_KINDS = "ALIGNKIT_", ("PAT", "ATP")
"""What adapters that remove structures are called in their files, in the place of a kind of PEFT's."""
_PATTERN_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Keys whose texts PEFT takes for regular expressions."""


def is_sparse_kind(kind: str) -> bool:
    """Whether a saved adapter removes structures of its base, by what its configuration calls it."""
    return kind.startswith(SPARSE_PREFIX) and kind.removeprefix(SPARSE_PREFIX) in SPARSE_KINDS


def config_problem(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the config of an adapter, or None.

    Args:
        config: Content of ``adapter_config.json``.
    """
    for key, (is_right, expected) in _KEYS.items():
        value = config.get(key)
        if value is not None and not is_right(value):
            return f"{key} is {value!r:.60}, expected {expected}"
    for pattern in (text for key in _PATTERN_KEYS for text in _texts(config.get(key))):
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return f"it has a pattern, {pattern!r:.60}, that is none: {error}"
    return None


def possible_patterns(config: Mapping[str, Any]) -> list[str]:
    """All texts in the config of an adapter: PEFT takes more of them for regular expressions than it says.

    Args:
        config: Content of ``adapter_config.json``.
    """
    return list(dict.fromkeys(_texts(config)))


def _texts(value: Any) -> Iterator[str]:
    """The texts anywhere in a value, keys of mappings among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and 0 < value <= MOST_RANK


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _are_ranges(value: Any) -> bool:
    """Whether these are ranges of layers that come to a number of layers which a model may have."""
    pairs = value if isinstance(value, list) else [None]
    are_pairs = all(isinstance(pair, list) and [type(end) for end in pair] == [int, int] for pair in pairs)
    return are_pairs and sum(abs(end - start) for start, end in pairs) <= MOST_LAYERS


def _of_names(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(is_right, value.values()))


_NAMES = (_are_names, "a text or a list of texts")
_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a text"),
    "revision": (_is_text, "a text"),
    "r": (_is_rank, f"a whole number from 1 to {MOST_RANK:,}"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _NAMES,
    "layers_pattern": _NAMES,
    "layer_replication": (_are_ranges, f"pairs of whole numbers that span at most {MOST_LAYERS:,} layers"),
    "rank_pattern": (_of_names(_is_rank), f"a rank, 1 to {MOST_RANK:,}, by name"),
    "alpha_pattern": (_of_names(_is_number), "a number by name"),
}
