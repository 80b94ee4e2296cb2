"""A quarter of the feed-forward channels of a small language model driven out in a short run, by each regulariser."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.parametrizations._sparse import GroupPull
from intervals import interval_text, student_interval
from pages import table

SHARED = Path(__file__).resolve().parents[3] / "shared"
MODEL, ROWS = SHARED / "models" / "gsm-tiny", SHARED / "data" / "gsm8k"
STEPS, BATCH, RATE, PART, SEEDS = 40, 4, 3e-4, 0.25, 3
UNTIL = 0.7
ARMS: dict[str, dict[str, Any] | None] = {
    "full fine-tuning, nothing removed": None,
    "removed by magnitude at the start": {"sparse_regulariser": "mask_sparsity", "sparse_until": 1 / STEPS},
    "mask_sparsity": {"sparse_regulariser": "mask_sparsity"},
    "group_lasso": {"sparse_regulariser": "group_lasso"},
    "wgsef": {"sparse_regulariser": "wgsef"},
    "group_lasso, a tenth of the coefficient": {"sparse_regulariser": "group_lasso", "sparse_coef": 0.1},
    "wgsef, a tenth of the coefficient": {"sparse_regulariser": "wgsef", "sparse_coef": 0.1},
}
TEXT = f"""\
`gsm-tiny` (2.8 M parameters, trained on GSM8K's training questions), all weights, {STEPS}
AdamW steps of {BATCH} training rows at {RATE:g}; a quarter of the 512 feed-forward channels of each of the 6 layers
goes, with `parametrization: sparse` at its defaults (coefficient 1, the choice after {UNTIL:.0%} of the steps). NLL in
nats a token on 48 test rows; *at the choice* is right after the last step that is followed by a pull, with the other
channels at zero. Norms are parts of those of the same channels at the start, one step before the choice. {SEEDS} seeds,
which draw the rows; 95 % Student intervals. The tenth was added after the first five arms had been seen.
"""


def batches(seed: int, count: int, file: str, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Padded batches of questions with their answers."""
    lines = [json.loads(line) for line in (ROWS / file).read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))[: count * BATCH].tolist()
    found = []
    for first in range(0, len(order), BATCH):
        texts = [_text(lines[i], tokenizer) for i in order[first : first + BATCH]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return found


def _text(line: dict[str, str], tokenizer: Any) -> str:
    turns = [{"role": "user", "content": line["question"]}, {"role": "assistant", "content": line["answer"]}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text


@torch.no_grad()
def nll(model: Any, held_out: Sequence[dict[str, Tensor]]) -> float:
    """Nats a token."""
    sums, tokens = 0.0, 0
    for batch in held_out:
        count = int((batch["labels"][:, 1:] != -100).sum())
        sums, tokens = sums + float(model(**batch).loss) * count, tokens + count
    return sums / tokens


def run(seed: int, keys: dict[str, Any] | None, directory: Path) -> dict[str, float]:
    """Train once, and measure at the choice and at the end."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    usual = {"sparse_coef": 1.0, "sparse_ffn": PART, "sparse_kv_groups": 0.0, "sparse_until": UNTIL}
    config = SimpleNamespace(**usual | {"sparse_anneal_fraction": 0.3} | (keys or {}))
    pull = None if keys is None else GroupPull(config, model, directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    held_out, found = batches(0, 12, "test.jsonl", tokenizer), {}
    for step, batch in enumerate(batches(seed, STEPS, "train.jsonl", tokenizer)):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if pull is None:
            continue
        before = pull.metrics()
        pull.before_step(step, STEPS)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            pull.after_step(step)
        if said.getvalue():
            found = {"kept": before["sparse/ffn_kept_norm"], "others": before["sparse/ffn_other_norm"]}
            found["at the choice"] = nll(model, held_out)
    return found | {"at the end": nll(model, held_out)}


def model_section() -> str:
    """Text and table."""
    names = ("kept", "others", "at the choice", "at the end")
    rows = []
    for arm, keys in ARMS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = [run(seed, keys, Path(folder)) for seed in range(SEEDS)]
        cells = [np.array([found[name] for found in runs]) if name in runs[0] else None for name in names]
        write = partial(interval_text, interval=student_interval)
        rows.append([arm, *("-" if cell is None else write(cell) for cell in cells)])
        print(rows[-1], flush=True)
    head = ["arm", "norm of those kept", "norm of the others", "NLL at the choice", "NLL at the end"]
    return f"{TEXT}\n{table(head, rows)}"
