"""What training that prunes costs: an optimizer step of ``pat`` and ``atp`` beside one of LoRA with as many parameters.

    python scripts/benchmark_pruning_step.py
    python scripts/benchmark_pruning_step.py --rounds 9 --model meta-llama/Llama-3.2-1B

All train one model on the same rows with trainers/sft.py's trainer, in turns in one process with one thread; processor
time is counted. Memory is what the forward pass keeps for the backward pass, each storage once, and the numbers that
train with their gradients and moments.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alignkit.programs.entry import run_program

LORA_RANK = 8
SIDES: dict[str, dict[str, Any]] = {
    "lora": {"parametrization": "lora"},
    "pat, mask in motion": {"parametrization": "pat", "lora_r": LORA_RANK, "pat_milestone_steps": None},
    "pat, mask hard": {"parametrization": "pat", "lora_r": LORA_RANK, "pat_milestone_steps": 2},
    "atp, decisions in motion": {"parametrization": "atp", "lora_r": LORA_RANK, "atp_control_fraction": 0.99},
    "atp, decisions settled": {"parametrization": "atp", "lora_r": LORA_RANK, "atp_control_fraction": 0.01},
}


def save_model(folder: Path, options: argparse.Namespace) -> None:
    """A random Llama and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, options.vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def build(keys: dict[str, Any], folder: Path, options: argparse.Namespace) -> Any:
    """The trainer of a run, as a run builds it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from alignkit.config import load_config
    from alignkit.parametrizations._policy import attach, load_policy, prepare
    from alignkit.parts.shape import load_bridge, shapes_by_program
    from alignkit.runs.arguments import training_arguments
    from alignkit.runs.rows import PreparedData
    from alignkit.yaml_text import dump_yaml

    values = {
        "model": str(folder) if options.model is None else options.model,
        "data": "rows.jsonl",
        "output_dir": str(folder / "run"),
        "method": "sft",
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps + options.warmup,
        "logging_steps": options.steps + options.warmup,
        "max_length": options.tokens,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "use_cpu": True,
        **keys,
    }
    (folder / "run.yaml").write_text(dump_yaml(values))
    config: Any = load_config("sft", folder / "run.yaml", check_files=False).config
    bridge, tokenizer = load_bridge(shapes_by_program()["sft"]), AutoTokenizer.from_pretrained(config.model)
    args = training_arguments(config, bridge, {})
    args.disable_tqdm, args.report_to = True, []
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(2, options.vocabulary)}" for _ in range(options.tokens // 2)) for _ in "ab"]
    source = Dataset.from_list([{"prompt": texts[0] + " ", "completion": texts[1]}] * options.batch_size * 4)
    rows, _ = bridge.converter(config, tokenizer)(source, name="train")
    policy = load_policy(config)
    inherited = {"choices": {}, "gradient_rule": None, "peft_config": prepare(config, policy), "callbacks": []}
    data = PreparedData(rows, None, [], source)
    trainer = bridge.build(config, args, policy, tokenizer, data, exchanges_rows=False, **inherited)
    attach(config, trainer)
    return trainer


def trained_numbers(trainer: Any) -> int:
    """How many numbers move."""
    return sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)


def timed(trainer: Any, options: argparse.Namespace) -> float:
    """Processor seconds of a step; the first ones, which allocate, are left out."""
    from transformers import TrainerCallback

    marks = []

    class Clock(TrainerCallback):
        """Reads the processor time after each step."""

        def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
            """One reading."""
            marks.append(time.process_time())

    trainer.add_callback(Clock())
    trainer.train()
    return (marks[-1] - marks[options.warmup - 1]) / options.steps


def held(trainer: Any) -> int:
    """Bytes that a step holds beside the weights that stay: for the backward pass, and of what trains."""
    import torch

    batch = next(iter(trainer.get_train_dataloader()))
    storages: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainer.model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.evaluate_objective(trainer.model, batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    activations = sum(size for pointer, size in storages.items() if pointer not in weights)
    return activations + 16 * trained_numbers(trainer)


def lora_rank(folder: Path, options: argparse.Namespace) -> int:
    """Rank at which LoRA has as many parameters as PAT, as near as there is one."""
    counts = [trained_numbers(build(SIDES[side], folder, options)) for side in ("lora", "pat, mask hard")]
    return round(counts[1] / (counts[0] / 16))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cost of a step that prunes against one of LoRA.")
    parser.add_argument("--model", help="a saved model; a random Llama otherwise")
    defaults = {"rounds": 5, "steps": 6, "warmup": 3, "batch_size": 4, "tokens": 256, "width": 512, "layers": 6}
    for name, default in {**defaults, "vocabulary": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


def main() -> None:
    """Rounds, and ratios with their range."""
    options = parse(sys.argv[1:])

    import torch

    torch.set_num_threads(1)
    SIDES["pat, mask in motion"]["pat_milestone_steps"] = options.steps + options.warmup - 1
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    numbers, memory = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save_model(folder, options)
        with contextlib.redirect_stdout(io.StringIO()):
            SIDES["lora"]["lora_r"] = rank = lora_rank(folder, options)
            for _ in range(options.rounds):
                for side, keys in SIDES.items():
                    trainer = build(keys, folder, options)
                    numbers[side], memory[side] = trained_numbers(trainer), held(trainer)
                    seconds[side].append(timed(trainer, options))
    print(
        f"{options.batch_size} rows of {options.tokens} tokens, {options.rounds} rounds, one thread; LoRA rank {rank}"
    )
    print(f"{'':26}{'trained':>10}  {'a step':>9}  {'against lora':22}  memory against lora")
    for side, found in seconds.items():
        ratios = [ours / plain for ours, plain in zip(found, seconds["lora"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        share = memory[side] / memory["lora"]
        print(f"{side:26}{numbers[side]:>10,}  {statistics.median(found):7.3f} s  {spread:22}  {share:.3f} x")


if __name__ == "__main__":
    run_program(main)
