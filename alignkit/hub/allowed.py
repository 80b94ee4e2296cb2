"""Which files of a directory may be published: those whose names are known, and nothing else that lies beside them.

A directory can hold anything: keys, data, notes, links. A list of what must stay is never complete, so this is a list
of what may go. A file reached by a link that leads out of the directory is none of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from alignkit.hub.card import CARD, Kind
from alignkit.models.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD_OF_THE_ADAPTER,
    MODEL_CONFIG,
    TOKENIZER_CONFIG,
    read_json,
)
from alignkit.models.fingerprints import ORIGIN_FILE
from alignkit.storage.durability import MARKER, checkpoints

WEIGHTS = {
    "adapter": (ADAPTER_CONFIG, ADAPTER_WEIGHTS),
    "model": (
        MODEL_CONFIG, "generation_config.json", "model.safetensors", "model.safetensors.index.json",
        "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors",
    ),
}  # fmt: skip
TOKENIZER = (
    "tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
"""The tokenizer, and the processor of a model that takes more than text."""
CARD_AND_EVIDENCE = (
    CARD, "plot.png", ORIGIN_FILE, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
    "pruning_plan.json", "pruning_report.json", "pruning.png",
)  # fmt: skip
"""The card, the plots it shows, what was pruned, what the weights were made of, and the terms they come under."""
RECORDS = (
    "run.json", "manifest.json", "metrics.jsonl", "eval.json", "evaluation.json", "all_results.json",
    "eval_results.json", "train_results.json", CARD_OF_THE_ADAPTER, "runs/*/events.out.tfevents.*",
    "logs/events.out.tfevents.*",
)  # fmt: skip
"""Records of how it was made, sent when asked for; they may name paths of this machine."""
NEVER = "training_args.bin"
"""A pickle, which runs code where it is opened."""


def allowed_files(root: Path, kind: Kind, *, include_metrics: bool, include_checkpoints: bool) -> list[str]:
    """Names of the files that may be published, links included.

    Args:
        root: The directory.
        kind: What it holds.
        include_metrics: Whether the records of the run may go.
        include_checkpoints: Whether checkpoints may go, with what their own list names.
    """
    patterns = (*WEIGHTS[kind], *TOKENIZER, *CARD_AND_EVIDENCE, *(RECORDS if include_metrics else ()))
    listed = {*_modules(root), *(_checkpoint_files(root) if include_checkpoints else ())}
    names = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file())
    return [name for name in names if name in listed or any(_matches(name, pattern) for pattern in patterns)]


def leads_out(root: Path, name: str) -> bool:
    """Whether a name is, or passes through, a link to somewhere outside the directory.

    Args:
        root: The directory.
        name: Name of a file in it.
    """
    return not (root / name).resolve().is_relative_to(root.resolve())


def _matches(name: str, pattern: str) -> bool:
    """Whether names agree folder by folder; ``*`` does not reach into another one."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _modules(root: Path) -> Iterator[str]:
    """Python files that the configs name as the code of the model or tokenizer."""
    for config in (MODEL_CONFIG, TOKENIZER_CONFIG):
        if (root / config).is_file():
            content = read_json(root / config)
            for module in re.findall(r'"(\w+)\.\w+"', json.dumps(content.get("auto_map", {}))):
                yield f"{module}.py"


def _checkpoint_files(root: Path) -> Iterator[str]:
    """What the complete checkpoints in a directory, and the directory if it is one, list as theirs."""
    for folder in [root, *checkpoints(root)]:
        if (folder / MARKER).is_file():
            for name in [MARKER, *json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]]:
                if Path(name).name != NEVER:
                    yield (folder / name).relative_to(root).as_posix()
