"""Prove that a folder is a model which stock transformers loads whole, and that it says what the masked model says.

A pruned checkpoint can be wrong without a word: a tensor that is missing is made up, one too many is dropped, and both
are only logged; a norm that was not corrected changes every logit a little. So the folder is loaded in a fresh Python
process in which nothing of this package takes part, and its answers are compared here:

- nothing is missing, unexpected or of another shape, and the files hold as many numbers as the model has;
- its logits are those of the masked model;
- a token that is read through the KV cache gets the logits it gets without, and the same tokens are generated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from alignkit.errors import ModelError

_CHILD = Path(__file__).with_name("fresh_process.py")
_FAULTS = {
    "missing_keys": "weights of the model are in no file, so that loading makes them up",
    "unexpected_keys": "tensors of the files have no place in the model, so that loading drops them",
    "mismatched_keys": "tensors have another shape than the config says",
}


@dataclass(frozen=True)
class Verification:
    """What the check of a folder found.

    Attributes:
        max_error: Largest difference of a logit from the masked model's.
        cache_error: Largest difference of a logit with the KV cache from the one without.
        tolerance: Largest admissible value of either.
        positions: Tokens whose logits were compared.
        parameters: Numbers in the model, tied weights counted once.
        bytes: Size of the files of its weights.
        model_class: The class that transformers loads it as.
        transformers: Version it was loaded with.
    """

    max_error: float
    cache_error: float
    tolerance: float
    positions: int
    parameters: int
    bytes: int
    model_class: str
    transformers: str

    def to_json(self) -> dict[str, Any]:
        """For ``pruning_report.json``."""
        return asdict(self)


def verify(
    directory: Path, texts: Sequence[Sequence[int]], masked_logits: Sequence[Tensor], tolerance: float
) -> Verification:
    """Load a folder with plain transformers in a fresh process, on the CPU in float32, and compare.

    Args:
        directory: The folder of an exported model.
        texts: Token ids; the longest has at least two tokens, the last of which is read through the cache.
        masked_logits: Of each text, logits [T, V] of the masked dense model.
        tolerance: Largest admissible difference of a logit.

    Raises:
        ModelError: It does not load, not whole, or not as the model that was masked; every difference is named.
    """
    refuse_code(directory)
    if max(map(len, texts), default=0) < 2:
        raise ModelError("the check of a pruned model needs a text of at least two tokens. Give a longer one.")
    with tempfile.TemporaryDirectory(prefix="alignkit-verify-") as folder:
        answer = _ask(directory, texts, Path(folder))
        logits = Path(folder) / "logits.safetensors"
        return judge(directory, answer, logits, masked_logits, tolerance)


def refuse_code(directory: Path) -> None:
    """Raise ModelError where a folder brings Python code: a stock model needs none, and none is ever run.

    Args:
        directory: The folder.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    code = [path.name for path in sorted(directory.rglob("*.py"))]
    if code or "auto_map" in config:
        what = f"holds {code[0]}" if code else "names classes of its own in config.json (auto_map)"
        raise ModelError(f"{directory} {what}: that is no model of stock transformers. Nothing in it was run.")


def judge(
    directory: Path, answer: Mapping[str, Any], logits: Path, masked_logits: Sequence[Tensor], tolerance: float
) -> Verification:
    """Compare what a fresh process found with what it must be.

    Args:
        directory: The folder.
        answer: What :func:`alignkit.pruning.fresh_process.look` returned.
        logits: The file it wrote.
        masked_logits: As for :func:`verify`.
        tolerance: As for :func:`verify`.

    Raises:
        ModelError: Anything differs.
    """
    problems = [
        f"{len(names)} {_FAULTS.get(kind, kind)}, such as {names[0]}"
        for kind, names in answer["loading"].items()
        if names
    ]
    files = sorted(directory.glob("*.safetensors"))
    stored = sum(map(_numbers, files))
    if not problems and stored != answer["parameters"]:
        problems.append(f"the files hold {stored:,} numbers, the model that is loaded {answer['parameters']:,}")
    max_error = _largest_difference(logits, masked_logits)
    for error, what in (
        (max_error, "from the masked model's"),
        (answer["cache_error"], "between reading through the KV cache and without"),
    ):
        if not error <= tolerance:
            problems.append(f"a logit differs by {error:.3g} {what} (tolerance {tolerance:g})")
    with_cache, without = answer["generated"]["True"], answer["generated"]["False"]
    if with_cache != without:
        problems.append(f"it generates tokens {with_cache} with the KV cache and {without} without")
    if problems:
        raise ModelError(f"{directory}, loaded with plain transformers, is not the masked model: {'; '.join(problems)}")
    return Verification(
        max_error,
        answer["cache_error"],
        tolerance,
        positions=sum(map(len, masked_logits)),
        parameters=answer["parameters"],
        bytes=sum(file.stat().st_size for file in files),
        model_class=answer["class"],
        transformers=answer["transformers"],
    )


def _ask(directory: Path, texts: Sequence[Sequence[int]], folder: Path) -> dict[str, Any]:
    """What the fresh process answers; it writes into ``folder``."""
    request = {
        "directory": str(directory.resolve()),
        "texts": [list(map(int, ids)) for ids in texts],
        "answer": str(folder / "answer.json"),
        "logits": str(folder / "logits.safetensors"),
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # -P: the modules that lie beside the program must not stand in for others of their names.
    done = subprocess.run(
        [sys.executable, "-P", str(_CHILD), str(folder / "request.json")],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"plain transformers cannot load and run {directory} in a fresh process (status {done.returncode}): "
            + "\n".join(said[-8:])
        )
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return answer


def _numbers(file: Path) -> int:
    """How many numbers the tensors of a file hold; only its header is read."""
    count = 0
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            size = 1
            for length in tensors.get_slice(name).get_shape():
                size *= length
            count += size
    return count


def _largest_difference(logits: Path, masked_logits: Sequence[Tensor]) -> float:
    """Largest difference of a logit; infinite where there are more or fewer of them."""
    differences = [0.0]
    with safe_open(logits, framework="pt") as found:
        if len(found.keys()) != len(masked_logits):
            return float("inf")
        for number, masked in enumerate(masked_logits):
            ours = found.get_tensor(str(number))
            if ours.shape != masked.shape:
                return float("inf")
            differences.append(float((ours.double() - masked.detach().cpu().double()).abs().max()))
    # Of the built-in max, a NaN that does not come first gets lost.
    return float(torch.tensor(differences).max())
