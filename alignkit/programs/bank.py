"""Make the reference bank of a router training ahead of it, and see what it is like.

    alignkit bank router/roma --model allenai/OLMoE-1B-7B-0924 --data questions.jsonl --bank_dir banks/olmoe
    accelerate launch --config_file ddp.yaml -m alignkit bank router/roma --data questions.jsonl
    alignkit bank router/roma --data questions.jsonl --tuned runs/roma

The words are those of the training it is for (alignkit train), so that the training finds the bank made. Beside the
bank stand report.json and routing.png, a picture of how its prompts are routed. With --tuned, a run of it, the picture
shows before and after training and is written to the run. A training makes what it does not find, so this is never
needed. Stopped, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config import parse_program_arguments
from alignkit.errors import ConfigError
from alignkit.models.files import read_adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.routing.store import RoutingBank

TUNED = "--tuned"


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """One bank, from the words of a training to the picture."""
    given, tuned = _split_tuned(list(sys.argv[1:] if words is None else words))
    if given[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    adapter = None if tuned is None else read_adapter(tuned)
    config: Any = parse_program_arguments("router", _with_recipe(given)).config

    # Torch and the Hugging Face libraries are imported here, once the command line is known to be right.
    from alignkit.models._forward import add_completion_head
    from alignkit.models.loading import load_adapter
    from alignkit.parametrizations._policy import load_model
    from alignkit.parts.method import Preparation
    from alignkit.programs.models import start_processes
    from alignkit.runs.rows import convert_splits, load_splits, load_tokenizer
    from alignkit.shapes import _routed

    state = start_processes(use_cpu=config.use_cpu)
    tokenizer = load_tokenizer(config)
    with state.main_process_first():
        splits = load_splits(config, tokenizer)
        converted = convert_splits(config, splits, _routed.converter(config, tokenizer), Preparation(config))
    rows = {"train": converted["train"][0]} | ({"eval": converted["held-out"][0]} if "held-out" in converted else {})
    model = load_model(config, config.model, config.model_revision).to(state.device).eval()
    add_completion_head(model)
    with _precision(config, state.device.type):
        bank, after = _routed.build_banks(model, tokenizer, rows, _routed.settings_of(config))["train"], None
        if adapter is not None:
            after = _routing_after(load_adapter(model, adapter), tokenizer, rows["train"], config, bank)
    if state.is_main_process:
        _tell(bank, after, bank.directory if tuned is None else Path(tuned), title=Path(config.model).name)


def _split_tuned(words: list[str]) -> tuple[list[str], str | None]:
    """The words of the training, and the value of the one that is not."""
    if TUNED not in words:
        return words, None
    place = words.index(TUNED)
    if place + 1 == len(words) or TUNED in words[place + 1 :]:
        raise ConfigError("command line", [f"`{TUNED}` takes one folder of a run: write {TUNED} runs/roma"])
    return words[:place] + words[place + 2 :], words[place + 1]


def _with_recipe(words: list[str]) -> list[str]:
    """The words with the recipe that stands first, as `alignkit train` takes it, behind ``--config``."""
    return ["--config", *words] if words and not words[0].startswith("-") else words


def _precision(config: Any, device: str) -> contextlib.AbstractContextManager[Any]:
    """What the training computes in."""
    import torch

    from alignkit.models.precision import mixed_bfloat16

    in_bfloat16, _ = mixed_bfloat16(config)
    if not (in_bfloat16 or config.fp16):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16 if in_bfloat16 else torch.float16)


def _routing_after(model: nn.Module, tokenizer: Any, rows: Any, config: Any, bank: RoutingBank) -> Tensor:
    """Routing [n, D] of the bank's rows under the tuned model."""
    from dataclasses import replace

    from alignkit.routing.build import refresh
    from alignkit.shapes import _routed

    given = _routed.RowsOfBank(rows, tokenizer)
    folder, size = bank.directory / "tuned", config.bank_batch_size
    anew = refresh(
        bank, model, tokenizer, given, replace(config, bank_success="all"), folder, batch_size=size, adapter="default"
    )
    return anew.routing


def _tell(bank: RoutingBank, after: Tensor | None, folder: Path, title: str) -> None:
    """Print what the bank is like, and write its report and the picture."""
    from alignkit.routing.picture import draw_routing
    from alignkit.routing.report import bank_report, render_report
    from alignkit.storage.durability import write_whole

    report, picture = bank_report(bank), folder / "routing.png"
    write_whole(bank.directory / "report.json", json.dumps(report, indent=1) + "\n")
    draw_routing(picture, bank.routing, bank.found["tasks"], bank.facts["tasks"], after=after, title=title)
    print(f"{render_report(report)}\nbank {bank.directory}\npicture {picture}")
