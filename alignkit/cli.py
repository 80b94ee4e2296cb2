"""The command ``alignkit``: train, evaluate, merge, prune, publish, and see what there is and what would be used.

Everything but the standard library is imported by the subcommand that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Sequence
from typing import NoReturn

from alignkit import __version__
from alignkit.programs.entry import run_program
from alignkit.shipped import configs_dir, program_path, recipe_names, recipe_path

_EPILOG = """\
examples:
  alignkit recipes
  alignkit train preference/flex_dpo --model Qwen/Qwen3-0.6B --data pairs.jsonl --output_dir runs/first
  alignkit train run.yaml --beta_neg 0.05
  alignkit config run.yaml --beta_neg 0.05
  alignkit evaluate --adapter runs/first --data heldout.jsonl --compare_base
  alignkit chat runs/first
  alignkit merge --adapter runs/first --output runs/first-merged
  alignkit prune --model Qwen/Qwen3-0.6B --output pruned --ffn 0.25 --criterion activation --data rows.jsonl
  accelerate launch --config_file zero2.yaml -m alignkit train run.yaml
"""
_PROGRAMS = {
    "data": "say what rows hold before training on them, and write those that are worth it",
    "evaluate": "evaluate a model or an adapter on held-out preference rows",
    "chat": "talk to a model in the terminal, tuned and base side by side",
    "serve": "serve a run over an OpenAI-compatible API, through vLLM or transformers",
    "merge": "merge an adapter into its base model",
    "prune": "make a model smaller so that stock code loads it, from a plan, a criterion or an adapter",
    "push": "publish an adapter or a model with its card on the Hugging Face Hub",
    "sample": "sample responses of a model to every prompt, as candidate lists",
    "score": "give every completion token a reward by contrastive prompting",
    "translate": "make a config of one of TRL, LLaMA-Factory or axolotl, or of a command line of theirs",
    "compare": "compare two runs step by step",
    "bank": "make the reference bank of a router training ahead of it, and draw it",
    "rollouts": "make the page of an online run's completions and their rewards",
    "memory": "show what a training step would take, part by part, and what to write where it does not fit",
    "rewards": "try reward functions on sample completions, or list them",
}
"""Files of ``alignkit/programs``, which judge their words themselves, with what they do."""

_SHOWN = {
    "methods": ("list the methods by the rows they train on, or say everything of one", "NAME"),
    "rules": ("list the gradient rules, or say everything of one", "NAME"),
    "parametrizations": ("list what may train, or say everything of one", "NAME"),
    "formats": ("list the ways in which rows may be written, or say everything of one", "NAME"),
    "keys": ("list the keys of a config, or say everything of one; a key of another toolkit is translated", "KEY"),
}
"""What there is, told by :mod:`alignkit.programs.show`."""


def main() -> NoReturn:
    """Entry point of the console script."""
    run_program(lambda: run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int | None:
    """Run one subcommand and return its exit status, None for success.

    Args:
        arguments: The words after ``alignkit``.
    """
    if arguments and arguments[0] in _PROGRAMS:
        program = importlib.import_module(f"alignkit.programs.{arguments[0]}")
        status: int | None = program.main(arguments[1:], f"alignkit {arguments[0]}")
        return status
    # train and config hand on `--key value` words, which are not argparse's to judge: the config knows all keys.
    own, overrides = _split_off_overrides(list(arguments))
    options = _parser().parse_args(own)
    if options.command == "train":
        return _train(options.recipe, overrides)
    if options.command == "config":
        return _config(options.recipe, overrides, schema=options.schema)
    if options.command in _SHOWN:
        from alignkit.programs.show import show

        print(show(options.command, options.name))
        return None
    return {"parts": _parts, "recipes": _recipes, "env": _env}[options.command]()


def _split_off_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words of this command, and from the first unknown ``--key`` on those of the configuration."""
    if arguments[:1] not in (["train"], ["config"]):
        return arguments, []
    known = {"-h", "--help", *(["--schema"] if arguments[0] == "config" else [])}
    for index, word in enumerate(arguments):
        after_recipe = arguments[0] == "train" and index >= 2
        if word.startswith("-") and (after_recipe or word not in known):
            return arguments[:index], arguments[index:]
    return arguments, []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alignkit",
        description="Preference and supervised tuning of language models on Hugging Face TRL.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"alignkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train from a config file or a shipped recipe",
        usage="alignkit train [RECIPE] [--key value ...]",
        description="Train. Keys on the command line win over the file; `alignkit train RECIPE --help` lists them.",
    )
    config = commands.add_parser(
        "config",
        help="print the config in force and the source of every value",
        usage="alignkit config [RECIPE] [--schema] [--key value ...]",
        description="Print the config a training would use, with the source of every value. Nothing is started.",
    )
    config.add_argument("--schema", action="store_true", help="print the JSON schema of config files instead")
    for command in (train, config):
        command.add_argument(
            "recipe", nargs="?", metavar="RECIPE", help="a YAML file, or a name `alignkit recipes` lists"
        )
    for name, summary in _PROGRAMS.items():
        commands.add_parser(name, help=summary)
    for name, (summary, argument) in _SHOWN.items():
        shown = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        shown.add_argument("name", nargs="?", metavar=argument, help="say everything of this one")
    commands.add_parser("parts", help="list methods, gradient rules and every other part that a run can be made of")
    commands.add_parser("recipes", help="list the shipped recipes")
    commands.add_parser("env", help="show versions and accelerators, and say what does not fit together")
    return parser


def _train(recipe: str | None, overrides: list[str]) -> int | None:
    from alignkit.config.program import program_of

    program = program_path(program_of(recipe, overrides))
    sys.argv = [str(program), *(["--config", recipe] if recipe else []), *overrides]
    runpy.run_path(str(program), run_name="__main__")
    return None


def _config(recipe: str | None, overrides: list[str], *, schema: bool) -> int | None:
    from alignkit.config import json_schema, load_config
    from alignkit.config.program import program_of

    program = program_of(recipe, overrides)
    if schema:
        import json

        print(json.dumps(json_schema(program), indent=2))
    else:
        # Files are not looked at: a config written for another machine can be printed here.
        print(load_config(program, recipe, overrides, check_files=False).render())
    return None


def _parts() -> int | None:
    from alignkit.parts.catalogue import KINDS

    for kind in KINDS:
        summaries = kind.summaries()
        width = max(map(len, summaries))
        print("\n".join([kind.title, *(f"  {name:<{width}}  {text}" for name, text in summaries.items())]) + "\n")
    return None


def _recipes() -> int | None:
    width = max((len(name) for name in recipe_names()), default=0)
    for name in recipe_names():
        header = recipe_path(name).read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {header.lstrip('# ')}")
    print(f"\naccelerate files: {configs_dir() / 'accelerate'}")
    return None


def _env() -> int | None:
    from alignkit.programs.doctor import report

    text, fits = report()
    print(text)
    return 0 if fits else 1


if __name__ == "__main__":
    main()
