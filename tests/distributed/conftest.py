"""Launches of the programs in every process layout, and the rows they train on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.data.synthetic import tiny_model, train_tokenizer
from tests.conftest import GSM8K
from tests.distributed.layouts import OPTIONS, Layout
from tests.launches import accelerate
from tests.programs.launching import REPOSITORY, RUN_TIMEOUT, Ended

Launch = Callable[..., Path]
ANSWERS = ("chosen", "rejected")


@pytest.fixture(scope="session")
def launch(launchers: Any, launch_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run a program in a layout and return the run directory.

    The run is forked, with the variables of the processes of a launch that all runs of the layout's config share;
    ``direct`` launches the program itself, as a user would. ``resume`` is a run directory to continue. An option that
    is None is left out.
    """

    def run(
        layout: Layout,
        options: Mapping[str, Any],
        program: str | Path = "preference",
        direct: bool = False,
        resume: Path | None = None,
    ) -> Path:
        output = resume or tmp_path_factory.mktemp("run") / "out"
        options = {**OPTIONS, **options, "output_dir": output}
        options |= {
            "per_device_train_batch_size": layout.batch_size,
            "gradient_accumulation_steps": layout.accumulation,
        }
        given = {key: value for key, value in options.items() if value is not None}
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        words += ["--resume"] if resume else []
        path = program if isinstance(program, Path) else REPOSITORY / "trainers" / f"{program}.py"
        # Nothing cached by another run may help.
        variables = {**layout.environment, "ALIGNKIT_CACHE": str(output.parent / "cache")}
        if direct:
            command = [*accelerate(layout.config), str(path), *words]
            done = subprocess.run(
                command, env=launch_environment | variables, capture_output=True, text=True, timeout=RUN_TIMEOUT,
                cwd=output.parent, check=False,
            )  # fmt: skip
            ended = Ended(done.returncode, done.stdout, done.stderr)
        else:
            ended = launchers(layout).run(*words, directory=output.parent, program=path, environment=variables)
        assert ended.exit_code == 0, ended.output[-2000:] + ended.errors[-4000:]
        return output

    return run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """GSM8K rows, and a small model that has seen them for a moment; a random one gives them a thousand nats."""
    folder = tmp_path_factory.mktemp("distributed_inputs")
    model, rows = str(folder / "model"), gsm8k_pairs(GSM8K, 24)
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] + row["rejected"] for row in rows], vocab_size=2048)
    fitted(tiny_model(tokenizer, 0), tokenizer, rows).save_pretrained(model)
    tokenizer.save_pretrained(model)
    paths = {"model": model, "teacher": str(folder / "teacher")}
    tiny_model(tokenizer, 1).save_pretrained(paths["teacher"])
    tokenizer.save_pretrained(paths["teacher"])
    forms = {"pairs": rows, "lists": lists_of(rows), "negatives": negatives_of(rows)}
    forms["prompts"] = [{"prompt": row["prompt"]} for row in rows]
    for name, form in forms.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in form))
        paths[name] = str(path)
    return paths


def fitted(model: Any, tokenizer: Any, rows: list[dict[str, Any]], steps: int = 60, batch_size: int = 4) -> Any:
    """``model`` after a few steps on the chosen and rejected answers, in turn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row[key], tokenize=False) for row in rows for key in ANSWERS]
    for step in range(steps):
        batch = tokenizer([texts[(step * batch_size + i) % len(texts)] for i in range(batch_size)], padding=True)
        tensors = {key: torch.tensor(batch[key]) for key in ("input_ids", "attention_mask")}
        labels = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)
        model(**tensors, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


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
    """The first line of a correct against that of a wrong solution of the same question.

    Lines and not whole solutions: a larger gradient shows that its norm is summed up in float32 where DeepSpeed takes
    float64, 5e-6 of it (tests/shapes/test_gradient_in_float64.py).
    """
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        solutions = [value for value in question.values() if isinstance(value, dict)]
        right = [s["solution"].partition("\n")[0] for s in solutions if s["is_correct"]]
        wrong = [s["solution"].partition("\n")[0] for s in solutions if not s["is_correct"]]
        if right and wrong and right[0] != wrong[0] and len(rows) < count:
            prompt = [{"role": "user", "content": question["question"]}]
            answers = zip(ANSWERS, (right[0], wrong[0]), strict=True)
            rows.append({"prompt": prompt, **{k: [{"role": "assistant", "content": v}] for k, v in answers}})
    return rows
