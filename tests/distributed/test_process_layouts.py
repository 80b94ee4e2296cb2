"""One step is one step: the process layouts agree, on real rows, through ``accelerate launch`` and the shipped configs.

Losses are compared to 6 decimals and gradient norms to 5 (a wrong normaliser hides in the loss, not in the gradient).
The token-level SFT term has a denominator that differs from rank to rank. Every run first shows which layout ran.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.data.synthetic import make_corpus, make_preferences, tiny_model, train_tokenizer

pytestmark = pytest.mark.xdist_group("distributed")

STEPS = 3
BUILD_COMMUNICATION = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"


@dataclass(frozen=True)
class Layout:
    """How one step of four pairs is laid out, and what run.json must say of it."""

    config: str | None
    batch_size: int
    accumulation: int
    world_size: int
    wrapper: str
    zero_stage: int | None = None


LAYOUTS = {
    "1x4": Layout(None, 4, 1, 1, ""),
    "1x1 accumulation 4": Layout(None, 1, 4, 1, ""),
    "ddp 2x2": Layout("cpu_ddp", 2, 1, 2, "DistributedDataParallel"),
    "zero2 2x2": Layout("cpu_zero2", 2, 1, 2, "DeepSpeedEngine", 2),
    "zero3 2x2": Layout("cpu_zero3", 2, 1, 2, "DeepSpeedEngine", 3),
}
OTHERS = [name for name in LAYOUTS if name != "1x4"]
SHARDED = ["zero2 2x2", "zero3 2x2"]


@dataclass(frozen=True)
class Run:
    """What is trained: a method with its options, the form of its rows, and how."""

    options: Mapping[str, Any]
    rows: str
    parametrization: str
    term: str = "loss/preference"


RUNS = {
    "flex_dpo full": Run({"method": "flex_dpo", "eta": 0.2}, "pairs", "full", "loss/sft"),
    "flex_dpo lora": Run({"method": "flex_dpo", "eta": 0.2}, "pairs", "lora", "loss/sft"),
    # Lists of different lengths, and an anchor that has moved before the second step.
    "adpo ema lora": Run(
        {"method": "adpo", "beta": 0.1, "anchor": "ema", "anchor_decay": 0.5, "eta": 0.1}, "lists", "lora"
    ),
    "adpo ema full": Run({"method": "adpo", "beta": 0.1, "anchor": "ema", "anchor_decay": 0.5}, "lists", "full"),
    # Rewards are made by the run itself, each rank making its share.
    "treg lora": Run({"method": "treg"}, "pairs", "lora", "loss/token_regularizer"),
    "d2o lora": Run({"method": "d2o"}, "negatives", "lora"),
}
CASES = [
    *(("flex_dpo full", name) for name in OTHERS),
    *(("flex_dpo lora", name) for name in SHARDED),
    *(("adpo ema lora", name) for name in OTHERS),
    ("adpo ema full", "zero3 2x2"),
    *(("treg lora", name) for name in ("ddp 2x2", *SHARDED)),
    ("d2o lora", "zero2 2x2"),
]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of the launched programs, with DeepSpeed's CPU communication built once, outside any time limit.

    DeepSpeed compiles it on first use, and a process killed while compiling leaves a lock that later ones wait for.
    """
    pytest.importorskip("deepspeed")
    extensions = Path(sys.prefix) / "torch_extensions"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    for lock in extensions.glob("*/lock"):
        lock.unlink()
    subprocess.run(
        [sys.executable, "-c", BUILD_COMMUNICATION], check=True, env=environment, capture_output=True, timeout=600
    )
    return environment


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, str]:
    """The trained model and GSM8K rows of the shared folder; in a bare clone a random model and synthetic rows."""
    folder = tmp_path_factory.mktemp("distributed_inputs")
    shared = repository.parent / "shared"
    solutions = shared / "data" / "gsm8k" / "example_model_solutions.jsonl"
    if solutions.is_file():
        model, rows = str(shared / "models" / "gsm-tiny"), gsm8k_pairs(solutions, 24)
    else:
        corpus = make_corpus(200, 0)
        tokenizer = train_tokenizer(corpus)
        model, rows = str(folder / "model"), make_preferences(24, 0)
        tiny_model(tokenizer, 0).save_pretrained(model)
        tokenizer.save_pretrained(model)
    paths = {"model": model}
    for name, form in (("pairs", rows), ("lists", lists_of(rows)), ("negatives", negatives_of(rows))):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in form))
        paths[name] = str(path)
    return paths


def lists_of(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lists of three and two candidates in turn; the third is the rejected answer of the next row."""
    rows = []
    for i, pair in enumerate(pairs):
        third = [pairs[(i + 1) % len(pairs)]["rejected"]] * (i % 2)
        completions = [pair["rejected"], pair["chosen"], *third]
        rows.append(
            {"prompt": pair["prompt"], "completions": completions, "scores": [0.3, 1.0, 0.1][: len(completions)]}
        )
    return rows


def negatives_of(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two answers in place of samples, then the negative."""
    nexts = [*pairs[1:], pairs[0]]
    return [
        {
            "prompt": pair["prompt"],
            "completions": [pair["chosen"], other["chosen"], pair["rejected"]],
            "scores": [1, 1, 0],
        }
        for pair, other in zip(pairs, nexts, strict=True)
    ]


def gsm8k_pairs(path: Path, count: int) -> list[dict[str, Any]]:
    """A correct against a wrong solution of the same question."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        question = json.loads(line)
        solutions = [value for value in question.values() if isinstance(value, dict)]
        right = [s["solution"] for s in solutions if s["is_correct"]]
        wrong = [s["solution"] for s in solutions if not s["is_correct"]]
        if right and wrong and len(rows) < count:
            prompt = [{"role": "user", "content": question["question"]}]
            answers = {"chosen": right[0], "rejected": wrong[0]}
            rows.append({"prompt": prompt, **{k: [{"role": "assistant", "content": v}] for k, v in answers.items()}})
    return rows


@pytest.fixture(scope="session")
def run(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], inputs: dict[str, str], repository: Path
) -> Any:
    """Launch a layout once; returns run.json and the logged steps."""
    finished: dict[tuple[str, str], tuple[dict[str, Any], list[dict[str, Any]]]] = {}

    def launch(what: str, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        if (what, name) not in finished:
            output = tmp_path_factory.mktemp("run") / "out"
            # Nothing cached by another layout may help.
            cache = {"ALIGNKIT_CACHE": str(output.parent / "cache")}
            launch_program(LAYOUTS[name], RUNS[what], inputs, output, environment | cache, repository)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            record = json.loads((output / "run.json").read_text())
            finished[what, name] = record, [line for line in lines if "loss" in line]
        return finished[what, name]

    return launch


def launch_program(
    layout: Layout,
    what: Run,
    inputs: dict[str, str],
    output: Path,
    environment: dict[str, str],
    repository: Path,
) -> None:
    """``accelerate launch trainers/preference.py`` as a user would."""
    config = ["--num_processes", "1"]
    if layout.config is not None:
        config = ["--config_file", str(repository / "configs" / "accelerate" / f"{layout.config}.yaml")]
    options = {
        "model": inputs["model"],
        "data": inputs[what.rows],
        "output_dir": output,
        **what.options,
        "parametrization": what.parametrization,
        "max_length": 192,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        # Adam divides a gradient by its own size, so where it is almost 0 it would compare rounding, not layouts.
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        # Seven rows in batches of two: the ranks' last batches are filled up with repeated rows, which must not count.
        "eval_data": inputs[what.rows],
        "max_eval_rows": 7,
        "per_device_eval_batch_size": 2,
        "num_samples": 0,
        "probe_steps": 0,
        "per_device_train_batch_size": layout.batch_size,
        "gradient_accumulation_steps": layout.accumulation,
        "use_cpu": "true",
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    program = str(repository / "trainers" / "preference.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=420, cwd=output.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def saved_weights(directory: str) -> dict[str, torch.Tensor]:
    """The tensors a run saved."""
    (file,) = Path(directory).glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("what", "name"), CASES)
def test_layouts_agree(run: Any, what: str, name: str) -> None:
    layout = LAYOUTS[name]
    base_record, base = run(what, "1x4")
    record, steps = run(what, name)

    ran = record["process_layout"]
    assert ran["world_size"] == layout.world_size
    assert ran["backend"] == ("gloo" if layout.world_size > 1 else None)
    assert ran["zero_stage"] == layout.zero_stage
    if layout.wrapper:
        assert ran["wrapper"] == layout.wrapper
    whole = base_record["process_layout"]["local_parameters"]
    assert ran["local_parameters"] < 0.6 * whole if layout.zero_stage == 3 else ran["local_parameters"] == whole
    assert ran["per_device_train_batch_size"] * ran["gradient_accumulation_steps"] * ran["world_size"] == 4

    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    for ours, theirs in zip(steps, base, strict=True):
        # Six decimals, and one unit of the last for rounding: a float32 sum over 150 tokens is good to about 1e-5 nats,
        # of which beta lets a tenth through.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-5, rel=1e-5)
        for key in (RUNS[what].term, "rewards/margins", "mean_logps/chosen", "entropy"):
            assert ours[key] == pytest.approx(theirs[key], abs=2e-5, rel=1e-5), key
    assert base[0]["grad_norm"] > 0.1
    assert record["results"].keys() == base_record["results"].keys()
    for key, value in base_record["results"].items():
        assert record["results"][key] == pytest.approx(value, abs=2e-5, rel=1e-5), key
    ours_saved, theirs_saved = (saved_weights(r["config"]["output_dir"]["value"]) for r in (record, base_record))
    # ZeRO-2 writes a tied head as a tensor of its own; loading ties it again.
    assert set(ours_saved) - {"lm_head.weight"} == set(theirs_saved)
    for key, tensor in theirs_saved.items():
        torch.testing.assert_close(ours_saved[key], tensor, atol=2e-6, rtol=1e-4, msg=key)


def test_sft_denominators_differ_between_ranks(inputs: dict[str, str]) -> None:
    """Otherwise a mean of means would pass: chosen responses must differ in length."""
    rows = [json.loads(line) for line in Path(inputs["pairs"]).read_text().splitlines()]
    assert len({len(row["chosen"][0]["content"]) for row in rows}) > len(rows) // 2
