"""The whole way in a few minutes on a CPU, without any download: ``make quickstart``.

Generates conversations and preferences, trains a tiny base model from scratch, aligns it with flex_dpo through
``accelerate launch``, evaluates before and after, and says where everything is. The base model can add, but has learnt
to evade; the preferences ask for the correct sum.

    python scripts/quickstart.py [--output quickstart] [--seed 0] [--overwrite]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from alignkit.errors import AlignkitError, RunDirectoryError
from alignkit.programs.entry import run_program
from alignkit.shipped import program_path

BASE_EPOCHS = 2
MARK = "quickstart.json"
"""File that says that a folder is a quickstart's."""
WRITTEN = {
    "data": ("corpus.jsonl", "preferences_train.jsonl", "preferences_heldout.jsonl", "prompts.jsonl"),
    "base": (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    ),
    "run": (),
    ".": ("evaluation.json",),
}  # fmt: skip
"""What is written, by folder, and so what is deleted to write it anew; the run deletes its own files."""


def main() -> None:
    """Data, base model, preference run, evaluation, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier quickstart wrote there")
    options = parser.parse_args()
    started = time.perf_counter()
    make_folder(options.output, overwrite=options.overwrite)

    headline(1, "synthetic conversations and preferences, and a tiny base model trained on them from scratch")
    files = train_base(options.output, options.seed)
    headline(2, "flex_dpo on the preferences, launched with accelerate")
    align(options.output, options.seed, overwrite=options.overwrite)
    headline(3, "evaluation of the base and of the tuned model on held-out prompts")
    evaluate(options.output, files["preferences_heldout"])
    report(options.output, time.perf_counter() - started)


def headline(number: int, text: str) -> None:
    """Say which of the three steps begins."""
    print(f"\n[{number}/3] {text}\n", flush=True)


def make_folder(folder: Path, *, overwrite: bool) -> None:
    """An empty folder, or with ``overwrite`` that of an earlier quickstart without its files; others' files stay."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise RunDirectoryError(f"{folder} is not empty, and has no {MARK} of a quickstart. Give another --output.")
        if not overwrite:
            advice = "Write --overwrite to replace it, or give another --output."
            raise RunDirectoryError(f"{folder} holds an earlier quickstart. {advice}")
        if links := [str(folder / part) for part in WRITTEN if part != "." and (folder / part).is_symlink()]:
            raise RunDirectoryError(
                f"{links[0]} is a link, and no link is followed. Remove it, or give another --output."
            )
        for part, names in WRITTEN.items():
            for name in names:
                (folder / part / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps({"written by": "scripts/quickstart.py"}) + "\n", encoding="utf-8")


def train_base(folder: Path, seed: int) -> dict[str, Path]:
    """Write the data and train tokenizer and base model; returns the data files."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from alignkit.data.synthetic import tiny_model, train_tokenizer, write_quickstart_data
    from alignkit.runs.progress import ShortProgress

    torch.set_num_threads(os.cpu_count() or 1)
    files = write_quickstart_data(folder / "data", seed)
    corpus = [json.loads(line) for line in files["corpus"].read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(row["messages"] for row in corpus)
    model = tiny_model(tokenizer, seed)
    arguments = SFTConfig(
        output_dir=str(folder / "base"),
        num_train_epochs=BASE_EPOCHS,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=60,
        weight_decay=0.01,
        max_length=None,
        assistant_only_loss=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=50,
        report_to="none",
        save_strategy="no",
        seed=seed,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(corpus), processing_class=tokenizer)
    use_short_progress(trainer, ShortProgress)
    trainer.train()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return files


def use_short_progress(trainer: Any, progress: type) -> None:
    """One short line a log in place of a dictionary."""
    from transformers.trainer_callback import ProgressCallback

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress())


def align(folder: Path, seed: int, *, overwrite: bool) -> None:
    """The preference run: the command a user would type."""
    program = os.path.relpath(program_path("preference"))
    arguments = ["--config", "smoke/quickstart", "--seed", str(seed), *(["--overwrite"] if overwrite else [])]
    if folder != Path("quickstart"):
        arguments += ["--model", str(folder / "base"), "--output_dir", str(folder / "run")]
        arguments += ["--data", str(folder / "data" / "preferences_train.jsonl")]
        arguments += ["--eval_data", str(folder / "data" / "preferences_heldout.jsonl")]
    launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    print("$ accelerate launch " + " ".join([*launch, program, *arguments]) + "\n", flush=True)
    run([sys.executable, "-m", "accelerate.commands.launch", *launch, program, *arguments])


def evaluate(folder: Path, held_out: Path) -> None:
    """The evaluation: again the command a user would type."""
    arguments = ["--adapter", str(folder / "run"), "--data", str(held_out), "--compare_base"]
    arguments += ["--num_samples", "3", "--output", str(folder / "evaluation.json")]
    print("$ alignkit evaluate " + " ".join(arguments) + "\n", flush=True)
    run([sys.executable, "-m", "alignkit", "evaluate", *arguments])


def run(command: list[str]) -> None:
    """Run a step in a process of its own."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))}
    if subprocess.run(command, check=False, env=os.environ | threads).returncode != 0:
        raise AlignkitError("the step above failed; its message says why")


def report(folder: Path, seconds: float) -> None:
    """Where everything is."""
    print(f"\nDone in {seconds / 60:.1f} minutes. Look at:")
    for label, path in {
        "plot": folder / "run" / "plot.png",
        "model card": folder / "run" / "README.md",
        "adapter": folder / "run" / "adapter_model.safetensors",
        "metrics": folder / "run" / "metrics.jsonl",
        "evaluation": folder / "evaluation.json",
    }.items():
        print(f"  {label:<11} {path}")
    print("Next: the same command on your own rows, docs/howto/own_data.md")


if __name__ == "__main__":
    run_program(main)
