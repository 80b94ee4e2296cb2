"""A trainer of any batch shape, from a config and rows of text, through the calls a run makes of the shape's bridge."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignkit.config import load_config
from alignkit.config.keys import base_keys, program_methods
from alignkit.gradients._hook import ChosenRule
from alignkit.models.choices import Choice
from alignkit.parametrizations._policy import attach, load_policy, prepare
from alignkit.parts.method import Preparation, load_method
from alignkit.parts.shape import load_bridge, load_shape, shapes_by_program
from alignkit.runs.arguments import training_arguments
from alignkit.runs.rows import PreparedData
from alignkit.shapes._kernel_choice import take_kernels
from alignkit.yaml_text import dump_yaml

SHORT: Mapping[str, Any] = {
    "data": "rows.jsonl",
    "use_cpu": True,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}
"""A short run on the CPU, in keys that every program has."""
REWARD = f"{Path(__file__).parents[1] / 'online.py'}:share_of_vowels"
OWN_KEYS: Mapping[str, Mapping[str, Any]] = {
    "online": {"rewards": [REWARD], "num_generations": 4, "max_completion_length": 8},
    "router": {"max_length": 64, "bank_success": "all", "manifold_coef": 10.0},
}
"""Keys of one program beside those."""
MODEL_SHAPES: Mapping[str, Mapping[str, int]] = {"routed": {"num_experts": 4}}
"""What the tiny model of a batch shape is, where it is not the plain one."""
ROW_KEYS: Mapping[str, Any] = {"max_length": 64}
"""Keys of the other programs."""


PLAINEST: Mapping[str, str] = {"preference": "dpo", "sft": "sft"}
"""The method that stands for a program with many: others with fewer options have no reference, or no falling loss."""


def plainest_method(program: str) -> str:
    """The method of a program with the fewest options, of those that train on the rows as they are."""
    if program in PLAINEST:
        return PLAINEST[program]
    plain = [name for name in program_methods(program) if load_method(name).preparation is Preparation]
    return min(plain, key=lambda name: len(fields(load_method(name).options)))


def config_of(program: str, model: str, folder: Path, **keys: Any) -> Any:
    """A short run of a program, checked as a user's config is.

    Args:
        program: Launch program.
        model: Folder of a saved model.
        folder: Where the config and the run go.
        **keys: What the config says besides.
    """
    own = OWN_KEYS.get(program, ROW_KEYS)
    values = {
        "method": plainest_method(program),
        **SHORT,
        **own,
        "model": model,
        "output_dir": str(folder / "run"),
        **keys,
    }
    file = folder / "run.yaml"
    file.write_text(dump_yaml(values))
    return load_config(program, file, check_files=False).config


def text_rows(config: Any, count: int, seed: int = 0) -> Dataset:
    """Rows of random words of the tiny tokenizer, in the first form that the program takes."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(f"w{draw.randrange(61)} " for _ in range(draw.randint(2, 8)))

    columns = config.row_family(vars(config)).forms[0].columns
    return Dataset.from_list([{column: text() for column in columns} for _ in range(count)])


def build(
    config: Any,
    rows: Dataset,
    evaluation: Dataset | None = None,
    rule: ChosenRule | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Any:
    """The trainer of a run, on a model loaded for it.

    Args:
        config: From :func:`config_of`.
        rows: Training rows as text.
        evaluation: Held-out rows as text.
        rule: Gradient rule.
        tokenizer: The one saved with the model, unless another is given.
    """
    choices: dict[str, Choice] = {}
    bridge = load_bridge(shapes_by_program()[config.program])
    tokenizer = AutoTokenizer.from_pretrained(config.model) if tokenizer is None else tokenizer
    args = training_arguments(config, bridge, choices)
    args.disable_tqdm, args.report_to = True, []
    convert, preparation = bridge.converter(config, tokenizer), load_method(config.method).preparation(config)
    tokens = [
        None
        if split is None
        else convert(split, name=name, max_dropped_fraction=0.0, **preparation.for_conversion(name))[0]
        for name, split in (("train", rows), ("held-out", evaluation))
    ]
    policy = load_policy(config)
    trainer = bridge.build(
        config,
        args,
        policy,
        tokenizer,
        PreparedData(tokens[0], tokens[1], [], rows),
        exchanges_rows=False,
        choices=choices,
        gradient_rule=rule,
        peft_config=prepare(config, policy),
        callbacks=[],
    )
    trainer.choices = choices | trainer.choices
    take_kernels(trainer, config.kernels)
    attach(config, trainer)
    return trainer


def layouts(shape: str) -> tuple[str | None, ...]:
    """The values of ``layout`` that lay batches of a shape out, or None alone where it has no such key."""
    keys = base_keys(load_shape(shape).program)
    return tuple(name for name in keys["layout"].info.choices or () if name != "auto") if "layout" in keys else (None,)
