"""What router alignment costs: processor time of an optimizer step, against the same step on cross-entropy alone.

    python scripts/benchmark_router.py
    python scripts/benchmark_router.py --rounds 9 --model allenai/OLMoE-1B-7B-0924

Both train the routers of the last layers of one model on the same rows: one with trainers/sft.py's trainer, which knows
nothing of routing, one with ``roma``, one with ``roma`` and DenseMixer. They take turns in one process with one thread,
and processor time is counted. The bank is made before the clock starts; its cost is another table.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alignkit.programs.entry import run_program

SIDES = {
    "ce": ("sft", {}),
    "roma": ("roma", {"gradient_ratio_steps": 0}),
    "roma, gradients compared every 100 steps": ("roma", {"gradient_ratio_steps": 100}),
    "roma, dense_mixer": ("roma", {"gradient_ratio_steps": 0, "dense_mixer": True}),
}


def save_model(folder: Path, options: argparse.Namespace) -> None:
    """A random Qwen3-MoE and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        moe_intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        head_dim=32,
        num_experts=options.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, options.vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def text_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """Prompts and completions of random words."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(2, options.vocabulary)}" for _ in range(count)) + " "

    count = options.batch_size * (options.steps + 1)
    return [{"prompt": words(options.prompt), "completion": words(options.completion)} for _ in range(count)]


def config_of(side: str, folder: Path, options: argparse.Namespace) -> Any:
    """The configuration of a side, checked as a user's is."""
    from alignkit.config import load_config
    from alignkit.yaml_text import dump_yaml

    method, keys = SIDES[side]
    program = "sft" if method == "sft" else "router"
    own = {"bank_dir": str(folder / "bank"), "bank_success": "all", "bank_layers": options.router_layers}
    values = {
        "model": str(folder) if options.model is None else options.model,
        "data": "rows.jsonl",
        "output_dir": str(folder / "run"),
        "method": method,
        "parametrization": "routers",
        "router_layers": options.router_layers,
        "router_aux_loss_coef": 0.0,
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps + 1,
        "logging_steps": options.steps + 1,
        "max_length": options.prompt + options.completion + 8,
        "save_strategy": "no",
        "use_cpu": True,
        **(own if program == "router" else {}),
        **keys,
    }
    (folder / "run.yaml").write_text(dump_yaml(values))
    return load_config(program, folder / "run.yaml", check_files=False).config


def build(side: str, folder: Path, options: argparse.Namespace) -> Any:
    """The trainer of a run, as a run builds it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from alignkit.parametrizations._policy import load_policy, prepare
    from alignkit.parts.shape import load_bridge, shapes_by_program
    from alignkit.runs.arguments import training_arguments
    from alignkit.runs.rows import PreparedData

    config = config_of(side, folder, options)
    bridge, tokenizer = load_bridge(shapes_by_program()[config.program]), AutoTokenizer.from_pretrained(config.model)
    args = training_arguments(config, bridge, {})
    args.disable_tqdm, args.report_to = True, []
    source = Dataset.from_list(text_rows(options))
    rows, _ = bridge.converter(config, tokenizer)(source, name="train")
    policy = load_policy(config)
    inherited = {"choices": {}, "gradient_rule": None, "peft_config": prepare(config, policy), "callbacks": []}
    data = PreparedData(rows, None, [], source)
    return bridge.build(config, args, policy, tokenizer, data, exchanges_rows=False, **inherited)


def timed(side: str, folder: Path, options: argparse.Namespace) -> float:
    """Processor seconds of a step; the first one, which allocates, is left out."""
    from transformers import TrainerCallback

    trainer, marks = build(side, folder, options), []

    class Clock(TrainerCallback):
        """Reads the processor time after each step."""

        def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
            """One reading."""
            marks.append(time.process_time())

    trainer.add_callback(Clock())
    trainer.train()
    return (marks[-1] - marks[0]) / options.steps


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost of router alignment against cross-entropy alone.")
    parser.add_argument("--model", help="a saved mixture of experts; a random one otherwise")
    defaults = {"rounds": 5, "steps": 6, "batch_size": 8, "prompt": 192, "completion": 16, "width": 256}
    defaults |= {"layers": 8, "experts": 16, "router_layers": 5, "vocabulary": 4096}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


def main() -> None:
    """Rounds, and ratios with their range."""
    options = parse(sys.argv[1:])

    import contextlib
    import io

    import torch

    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_model(folder, options)
        for _ in range(options.rounds):
            for side in SIDES:
                with contextlib.redirect_stdout(io.StringIO()):
                    seconds[side].append(timed(side, folder, options))
    print(f"{options.batch_size} rows of {options.prompt} + {options.completion} tokens, {options.rounds} rounds, cpu")
    for side, found in seconds.items():
        ratios = [ours / plain for ours, plain in zip(found, seconds["ce"], strict=True)]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{side:42} {statistics.median(found):7.3f} s   {statistics.median(ratios):.3f} x  {spread}")


if __name__ == "__main__":
    run_program(main)
