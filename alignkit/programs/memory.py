"""What a training step would take, before anything is launched or loaded, and what to write where it does not fit.

    alignkit memory run.yaml
    alignkit memory run.yaml --device_memory 80 --per_device_train_batch_size 4
    alignkit memory preference/dpo --data pairs.jsonl --processes 8 --zero_stage 3 --device_memory 80

The model is known from its config.json alone. Rows are tokenised if they are files here, since the longest decide;
otherwise they are taken to be as long as the config allows. Words beside those listed are keys of the configuration.
The exit status is 1 where a step would not fit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config import load_config
from alignkit.config.data_files import source_list
from alignkit.config.program import program_of
from alignkit.memory.estimate import PARTS, Estimate
from alignkit.parts.method import Preparation, load_method
from alignkit.programs.arguments import StrictParser, positive_int
from alignkit.reports.table import render_table

if TYPE_CHECKING:
    from alignkit.runs.memory import Plan

EXIT_DOES_NOT_FIT = 1
OWN = ("--device_memory", "--processes", "--zero_stage")
GIB = 2**30


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print the table, and what to write."""
    options, recipe, overrides = _read(list(sys.argv[1:] if words is None else words), prog)
    from alignkit.runs.memory import Launch, Plan

    config = _settled(load_config(program_of(recipe, overrides), recipe, overrides, check_files=False).config)
    device = "cpu" if config.use_cpu else "cuda"
    rows = _rows(config)
    plan = Plan.at_best(config, Launch(device, options.processes, options.zero_stage), *rows)
    limit = options.device_memory * GIB if options.device_memory else _memory_here(device)
    print(_heading(plan, rows[0] is not None))
    kept, recomputed = (plan.estimate(checkpointing=on) for on in (False, True))
    print(table(kept, recomputed))
    if not plan.shape.is_known:
        print(f"{plan.shape.kind} is not among the architectures that were measured: it is counted as a llama is")
    return _verdict(plan, kept, recomputed, limit)


def table(kept: Estimate, recomputed: Estimate) -> str:
    """The parts of a step in GiB, without and with gradient checkpointing."""
    rows = [
        [name, *(f"{each.parts.get(name, 0) / GIB:.2f}" for each in (kept, recomputed))]
        for name in PARTS
        if name in kept.parts or name in recomputed.parts
    ]
    rows.append(["together", *(f"{each.peak / GIB:.2f}" for each in (kept, recomputed))])
    rows.append(["highest in the", kept.where, recomputed.where])
    if kept.evaluation:
        rows.append(["an evaluation", *(f"{each.evaluation / GIB:.2f}" for each in (kept, recomputed))])
    return render_table(["GiB", "gradient_checkpointing: false", "true"], rows)


def _read(words: list[str], prog: str | None) -> tuple[argparse.Namespace, str | None, list[str]]:
    parser = StrictParser(__doc__ or "", prog=prog)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file, or a name `alignkit recipes` lists")
    parser.add_argument("--device_memory", type=positive_int, help="GiB of the device; by default that of the one here")
    parser.add_argument("--processes", type=positive_int, default=1, help="processes that share a step, one a device")
    parser.add_argument("--zero_stage", type=int, choices=(0, 1, 2, 3), default=0, help="of DeepSpeed")
    own, keys, words = [], [], list(words)
    while words:
        word = words.pop(0)
        name, has_value, _ = word.partition("=")
        is_own = name in (*OWN, "--help", "-h") or not (word.startswith("-") or keys)
        (own if is_own else keys).append(word)
        if name in OWN and not has_value and words:
            own.append(words.pop(0))
    options = parser.parse(own)
    return options, options.recipe, keys


def _settled(config: Any) -> Any:
    """The config with the precision it has on an accelerator that computes in bfloat16, which this machine may lack."""
    from dataclasses import replace

    from alignkit.parametrizations._policy import weights_dtype

    if config.bf16 == "auto":
        is_on = not (config.use_cpu or config.fp16 or config.dtype in ("float32", "float16"))
        config = replace(config, bf16=is_on)
    return replace(config, dtype=weights_dtype(config))


def _rows(config: Any) -> tuple[Any, Any]:
    """The tokenised rows of a run, where its files are here and hold all that a row needs; otherwise None."""
    sources = [source["path"] for key in (config.data, config.eval_data) if key for source in source_list(key)]
    is_here = all(Path(path).exists() for path in sources)
    if not is_here or config.streaming or load_method(config.method).preparation is not Preparation:
        return None, None
    from alignkit.parts.shape import load_bridge, shapes_by_program
    from alignkit.runs.rows import convert_splits, load_splits, load_tokenizer

    bridge, tokenizer = load_bridge(shapes_by_program()[config.program]), load_tokenizer(config)
    splits = load_splits(config, tokenizer)
    converted = convert_splits(config, splits, bridge.converter(config, tokenizer), Preparation(config))
    return tuple(converted[name][0] if name in converted else None for name in ("train", "held-out"))


def _memory_here(device: str) -> int | None:
    """Bytes that a run can have on this machine's device; None where it has none."""
    import torch

    from alignkit.runs.checkpointing import free_memory

    if device == "cpu":
        return free_memory(torch.device("cpu"))
    return free_memory(torch.device("cuda", 0)) if torch.cuda.is_available() else None


def _heading(plan: Plan, rows_known: bool) -> str:
    tokens, shape = plan.step(checkpointing=False).tokens, plan.shape
    how = "behind one another, without padding" if tokens.is_packed else f"{tokens.rows} rows of {tokens.length}"
    origin = "the longest rows of the data" if rows_known and plan.train else "rows as long as the config allows"
    return (
        f"{plan.config.model} ({shape.kind}, {shape.layers} layers of {shape.hidden}); a micro-batch of "
        f"{tokens.count:,} tokens, {how}: {origin}"
    )


def _verdict(plan: Plan, kept: Estimate, recomputed: Estimate, limit: int | None) -> int:
    from alignkit.runs.memory import knobs

    if limit is None:
        print("There is no accelerator here: write --device_memory with the GiB of yours, to see what would fit.")
        return 0
    asked = plan.config.gradient_checkpointing
    found = {True: recomputed, False: kept, "auto": kept if kept.peak <= limit else recomputed}[asked]
    if found.peak <= limit:
        auto = f", with gradient_checkpointing {'on' if found is recomputed else 'off'}" if asked == "auto" else ""
        print(f"It fits{auto}: {found.peak / GIB:.1f} of {limit / GIB:.1f} GiB.")
        return 0
    print(f"It does not fit: {found.peak / GIB:.1f} GiB, and there are {limit / GIB:.1f}. Any of these does:")
    fitting = knobs(plan, limit, checkpointing=found is recomputed)
    print("\n".join(f"  {knob}" for knob in fitting) or "  nothing that the config alone could change")
    return EXIT_DOES_NOT_FIT
