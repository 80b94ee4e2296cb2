"""Runs, caches and records as alignkit wrote them before its parts were moved, kept small for tests to go on with.

    python -m tests.programs.before_second_storey

makes ``tests/data/before_second_storey`` again with the code of this tree. That is right only while this code still
writes what users have on their disks: afterwards the folder is evidence, and the test beside this file must pass as it
lies there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

import tests.conftest  # noqa: F401  # no network and no telemetry, in here and in all that is started from here
from tests.programs.conftest import pairs, save_model, write_rows
from tests.programs.launching import REPOSITORY, SFT, Imported, Launcher, program_environment, write_config

FOLDER = REPOSITORY / "tests" / "data" / "before_second_storey"
KEPT, LAST = 4, 6
"""The step whose checkpoint is kept, and the last one."""

LORA = {"parametrization": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_modules": ["q_proj", "v_proj"]}
FULL = {"parametrization": "full"}
BASE: Mapping[str, Any] = {
    "model": "model",
    "data": "pairs.jsonl",
    "max_length": 64,
    "use_cpu": True,
    "max_steps": LAST,
    "save_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-2,
    # Adam divides a gradient by its own size: where it is almost 0, another machine's rounding would decide the step.
    "adam_epsilon": 1.0e-2,
    "num_samples": 0,
}
RUNS: Mapping[str, Mapping[str, Any]] = {
    # Copied after the third step; the drift of the fourth waits in the checkpoint for those of the next two.
    "adpo_lora_triggered": {
        "method": "adpo", "anchor": "kl_triggered", "anchor_threshold": 1.0e-6, "anchor_window": 3, **LORA
    },
    "adpo_full_ema": {"method": "adpo", "anchor": "ema", "anchor_decay": 0.5, **FULL},
    "sft_full": {"method": "sft", "data": "texts.jsonl", "packing": True, "lr_scheduler_type": "cosine", **FULL},
    "dpo_lora_decay": {"method": "dpo", "gradient_rule": "decay_to_init", "decay_coef": 10.0, **LORA},
    # Drawn before training and kept in the cache, drawn anew after the fourth step and kept in the checkpoint.
    "d2o_lora_refresh": {
        "method": "d2o",
        "data": "negatives.jsonl",
        "num_samples_per_prompt": 2,
        "sampling_max_new_tokens": 6,
        "sample_refresh_steps": KEPT,
        **LORA,
    },
    "treg_lora_precomputed": {
        "method": "treg", "contrast_prompts": "contrast.yaml", "reference": "precomputed", **LORA
    },
}  # fmt: skip
"""Configs by name, each on top of :data:`BASE`."""

CONTRAST = {
    "version": 1,
    "with_response": {"better": "w1 {prompt} w2 {response}", "worse": "w3 {prompt} w4 w5 {response}"},
    "without_response": {"better": "w1 {prompt} w2", "worse": "w3 {prompt} w4 w5"},
    "plain_text_ending": " w6 ",
}
"""Contrast prompts in words of the tiny tokenizer."""


def program_of(name: str) -> dict[str, Path]:
    """Which program makes a run, as an argument of the launcher."""
    return {"program": SFT} if RUNS[name]["method"] == "sft" else {}


def make(place: Path, launcher: Launcher) -> None:
    """All that the folder holds."""
    save_model(place / "model", hidden=16, num_hidden_layers=1)
    rows = pairs(14)
    write_rows(place / "pairs.jsonl", rows)
    write_rows(place / "negatives.jsonl", [{key: row[key] for key in ("prompt", "rejected")} for row in rows])
    write_rows(place / "texts.jsonl", [{"text": row["prompt"] + row["chosen"]} for row in pairs(80, seed=1)])
    (place / "contrast.yaml").write_text(yaml.safe_dump(CONTRAST))
    for name, options in RUNS.items():
        config = write_config(place / f"{name}.yaml", {**BASE, **options, "output_dir": name})
        ended = launcher.run(
            *("--config", config.name),
            directory=place,
            environment={"ALIGNKIT_CACHE": str(place / "cache")},
            **program_of(name),
        )
        assert ended.exit_code == 0, ended.errors[-4000:]
        stop_at_the_checkpoint(place / name)


def stop_at_the_checkpoint(run: Path) -> None:
    """Leave of a finished run what a kill after the checkpoint would have left, and beside it how it ended."""
    (weights,) = run.glob("*.safetensors")
    weights.rename(run.with_suffix(".end.safetensors"))
    kept = {"run.json", "manifest.json", "metrics.jsonl", f"checkpoint-{KEPT}"}
    for path in run.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def paths_of_this_machine(place: Path) -> Iterator[str]:
    """Files that say where they were made."""
    for path in sorted(place.rglob("*")):
        if path.is_file() and any(str(folder).encode() in path.read_bytes() for folder in (place, REPOSITORY)):
            yield path.relative_to(place).as_posix()


def main() -> None:
    """Make the folder anew."""
    with tempfile.TemporaryDirectory() as folder:
        place, output = Path(folder, "place"), Path(folder, "output")
        place.mkdir()
        output.mkdir()
        environment = program_environment(Path(folder, "home"))
        with closing(Imported(environment)) as imported:
            make(place, Launcher(output, [environment], imported))
        assert not (named := list(paths_of_this_machine(place))), f"these name a path of this machine: {named}"
        shutil.copy(FOLDER / "README.md", place)
        shutil.rmtree(FOLDER)
        shutil.copytree(place, FOLDER)


if __name__ == "__main__":
    main()
