"""What plain transformers makes of a folder of weights, in a process of its own: no line of alignkit takes part.

    python -P fresh_process.py REQUEST

The request is a JSON file with ``directory``, ``texts`` (token ids), and the files to write: ``answer`` (JSON) and
``logits`` (safetensors). :mod:`alignkit.pruning.verify` makes it and judges the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

NEW_TOKENS = 2
"""Generated with and without the cache: the first comes from the prompt alone, the second is read through the cache."""


@torch.no_grad()
def look(directory: str, texts: Sequence[Sequence[int]], logits: str) -> dict[str, Any]:
    """Load a folder as any user would, and run it; float32 on the CPU.

    Args:
        directory: Folder of the model.
        texts: Token ids; the longest one is what the cache is tried on.
        logits: File to write, with the logits [T, V] of each text under its number.
    """
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, local_files_only=True
    )
    model.eval()
    found = {str(number): model(torch.tensor([list(ids)])).logits[0] for number, ids in enumerate(texts)}
    save_file({number: value.contiguous() for number, value in found.items()}, logits)
    most = max(len(ids) for ids in texts)
    longest = torch.tensor([next(list(ids) for ids in texts if len(ids) == most)])
    whole = model(longest, use_cache=False).logits[0, -1]
    cache = model(longest[:, :-1], use_cache=True).past_key_values
    stepped = model(longest[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
    return {
        "loading": {kind: sorted(map(str, names)) for kind, names in loading.items()},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cache_error": float((stepped - whole).abs().max()),
        "generated": {str(use_cache): _continued(model, longest, use_cache) for use_cache in (True, False)},
        "class": type(model).__name__,
        "transformers": transformers.__version__,
    }


def _continued(model: Any, ids: torch.Tensor, use_cache: bool) -> list[int]:
    tokens: list[int] = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        use_cache=use_cache,
    )[0, ids.shape[1] :].tolist()
    return tokens


def main(request: str) -> None:
    """Answer one request."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    answer = look(asked["directory"], asked["texts"], asked["logits"])
    Path(asked["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
