"""Killed at a random moment and started again by the same command, a run ends with the bits of the run never killed.

Method x parametrisation x gradient rule x architecture class, one kill each. A run is a forked child that takes all of
the program's steps; ``--resume auto`` continues where a checkpoint is complete and begins anew where none is. Of an
online run the completions are compared as well: it is killed while some are drawn and not used up.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignkit.config import load_config
from alignkit.parts.method import load_method
from alignkit.runs.python import train_online, train_preference, train_sft
from alignkit.storage.durability import checkpoint_step, complete_checkpoints
from tests.chaos import drawing
from tests.chaos.architectures import ARCHITECTURES, MIXTURES, save_base
from tests.programs.conftest import pairs, save_model, write_rows
from tests.programs.launching import read_lines

pytestmark = pytest.mark.xdist_group("kills")
FORK = multiprocessing.get_context("fork")
COMMON: Mapping[str, Any] = {
    "use_cpu": True, "bf16": False, "max_steps": 8, "save_steps": 2, "logging_steps": 1, "warmup_steps": 1,
    "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_total_limit": 2, "max_length": 64, "num_samples": 0,
}  # fmt: skip
SAMPLED = {"method": "d2o", "data": "negatives.jsonl", "num_samples_per_prompt": 2, "sampling_max_new_tokens": 4}
ANCHORED = {"method": "adpo", "data": "pairs.jsonl"}
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "sft": {"method": "sft", "data": "answers.jsonl"},
    "dpo": {"method": "dpo", "data": "pairs.jsonl"},
    "flex_dpo": {"method": "flex_dpo", "data": "pairs.jsonl"},
    "treg": {"method": "treg", "data": "pairs.jsonl", "contrast_prompts": "contrast.yaml"},
    "treg simpo": {"method": "treg", "form": "simpo", "data": "pairs.jsonl", "contrast_prompts": "contrast.yaml"},
    "d2o": SAMPLED,
    "d2o refreshed": {**SAMPLED, "sample_refresh_steps": 3},
    "adpo fixed": ANCHORED,
    "adpo ema": {**ANCHORED, "anchor": "ema", "anchor_decay": 0.5},
    "adpo periodic": {**ANCHORED, "anchor": "periodic", "anchor_steps": 3},
    "adpo kl_triggered": {**ANCHORED, "anchor": "kl_triggered", "anchor_threshold": 1e-3, "anchor_window": 2},
    "adpo uniform": {**ANCHORED, "anchor": "uniform"},
}
"""Every method, with every kind of state that it may keep; each moves within the few steps of a run."""
DRAWN: Mapping[str, Any] = {
    "data": "prompts.jsonl", "rewards": f"['{drawing.__file__}:{drawing.reward.__name__}']", "max_length": None,
    "num_generations": 2, "max_completion_length": 6, "num_iterations": 2, "steps_per_generation": 3, "max_steps": 18,
    "save_steps": 1,
}  # fmt: skip
"""Six prompts, three a draw, whose completions make six micro-batches: a run of a pass and a half over the prompts."""
GUARDED = {**DRAWN, "method": "grpo_guard", "ema": 0.5, "num_steps": 2, "min_count": 1}
TWO = {"gradient_accumulation_steps": 2, "max_steps": 14}
FOUR = {"steps_per_generation": 4, "per_device_train_batch_size": 1, **TWO}
ONLINE: Mapping[str, Mapping[str, Any]] = {
    "grpo": {**DRAWN, "method": "grpo"},
    "grpo accumulated": {**DRAWN, "method": "grpo", "loss_type": "bnpo", **FOUR},
    "grpo against a reference": {**DRAWN, "method": "grpo", "beta": 0.1, **TWO},
    "grpo_guard": GUARDED,
    "grpo_guard accumulated": {**GUARDED, "mode": "full", **TWO},
    "grpo_guard of sequences": {**GUARDED, "importance_sampling_level": "sequence", "steps_per_generation": 2},
}
"""Methods whose completions are drawn by the run, with what decides where in a draw a step ends."""
RULES: Mapping[str | None, Mapping[str, Any]] = {
    None: {}, "asam": {"rho": 0.5}, "decay_to_init": {}, "glad": {}, "gnp": {}, "gsam": {}, "l2_sp": {}, "perpgrad": {},
    "random_perturbation": {}, "sagm": {}, "sam": {"every_k": 2},
}  # fmt: skip
PARAMETRIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "full": {"parametrization": "full"},
    "lora": {"parametrization": "lora"},
    "nf4": {"parametrization": "lora", "quantization": "nf4"},
}
CONTRAST = """\
version: 1
with_response: {better: "w1 w2 {prompt} w3 {response} w4", worse: "w5 w6 {prompt} w7 {response} w8"}
without_response: {better: "w1 w2 {prompt} w3", worse: "w5 w6 {prompt} w7"}
plain_text_ending: " "
"""
"""Prompts of token rewards in the words that these models know; others are all one word to them."""
DRAWING = ("qwen3", "llama", "qwen3_moe", "gpt_neox")
QUANTIZED = ("qwen3", "llama", "gemma2", "gpt_neox", "qwen3_moe", "deepseek_v3")
SEED = 9
CLOCK = ("runtime", "per_second", "step_time")
"""What is in the names of logged times."""


@dataclass(frozen=True)
class Case:
    """One run: what it trains, how, and on what."""

    objective: str
    parametrization: str
    rule: str | None
    kind: str

    def __str__(self) -> str:
        return f"{self.objective}-{self.parametrization}-{self.rule or 'none'}-{self.kind}"

    def settings(self) -> dict[str, Any]:
        """Keys of its config."""
        rule = {} if self.rule is None else {"gradient_rule": self.rule, **RULES[self.rule]}
        if (self.rule, self.parametrization) == ("glad", "full"):
            rule["rule_targets"] = "all"
        objective = {**OBJECTIVES, **ONLINE}[self.objective]
        chosen = {**COMMON, **objective, **PARAMETRIZATIONS[self.parametrization], **rule}
        keys = {key: value for key, value in chosen.items() if value is not None}
        return {**keys, "model": f"models/{self.kind}"}


def cases() -> Iterator[Case]:
    """Every architecture class in full and by adapter and every objective on nf4, objectives and rules going round."""
    number = itertools.count()

    def following(parametrization: str, kind: str) -> Case:
        n = next(number)
        # One rule further every round of the objectives, or each would meet the same few rules.
        rule = list(RULES)[(n + n // len(OBJECTIVES)) % len(RULES)]
        return Case(list(OBJECTIVES)[n % len(OBJECTIVES)], parametrization, rule, kind)

    for order in (("full", "lora"), ("lora", "full")):
        for kind in ARCHITECTURES:
            for parametrization in order:
                yield following(parametrization, kind)
    for _, kind in zip(OBJECTIVES, itertools.cycle(QUANTIZED)):
        yield following("nf4", kind)


def online_cases() -> Iterator[Case]:
    """Every online objective in full, by adapter and on nf4, and some with rules."""
    kinds = itertools.cycle(DRAWING)
    for objective in ONLINE:
        for parametrization in PARAMETRIZATIONS:
            yield Case(objective, parametrization, None, next(kinds))
    rules = ("sam", "decay_to_init", "glad", "random_perturbation", "sagm", "perpgrad")
    for objective, rule in zip(ONLINE, rules, strict=True):
        yield Case(objective, "lora", rule, next(kinds))


SHORT = (
    Case("sft", "full", None, "qwen3_moe"),
    Case("treg", "lora", "glad", "qwen3"),
    Case("d2o refreshed", "nf4", None, "llama"),
    Case("adpo ema", "full", "sam", "gpt_oss"),
    Case("grpo accumulated", "full", None, "qwen3"),
    Case("grpo_guard", "lora", "sam", "qwen3"),
)
LONG = {
    "rows": [case for case in dict.fromkeys(cases()) if case not in SHORT],
    "completions": [case for case in online_cases() if case not in SHORT],
}
"""What a run is trained on, and the cases of it."""
INSIDE = "while drawn completions were not used up"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows; models join it when they are asked for."""
    path = tmp_path_factory.mktemp("kills")
    save_model(path / "tokenizer")
    rows = pairs(12)
    write_rows(path / "pairs.jsonl", rows)
    write_rows(path / "answers.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    write_rows(path / "negatives.jsonl", [{key: row[key] for key in ("prompt", "rejected")} for row in rows])
    write_rows(path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[:6]])
    (path / "contrast.yaml").write_text(CONTRAST)
    return path


def base(workplace: Path, kind: str) -> None:
    """Save a model of an architecture with the tokenizer, once."""
    folder = workplace / "models" / kind
    if not folder.exists():
        save_base(kind, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(workplace / "tokenizer" / name, folder)


def _run(settings: Mapping[str, Any], workplace: Path, log: Path) -> None:
    """The program, in a child."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(workplace)
    torch.set_num_threads(1)
    os.environ[drawing.FILE] = str(log.with_suffix(".drawn"))
    program = load_method(settings["method"]).program
    train = {"sft": train_sft, "preference": train_preference, "online": train_online}[program]
    train(load_config(program, None, [f"--{key}={value}" for key, value in settings.items()]))
    os._exit(0)


def start(settings: Mapping[str, Any], workplace: Path, log: Path) -> Any:
    child = FORK.Process(target=_run, args=(settings, workplace, log))
    child.start()
    return child


def first_save(child: Any, run: Path, step: int = 1) -> float:
    """Wait until a checkpoint of a step, or a later one, is complete or the child has ended; returns when that was."""
    while child.is_alive() and not any(
        (checkpoint_step(marker.parent) or 0) >= step for marker in run.glob("checkpoint-*/complete.json")
    ):
        time.sleep(0.005)
    return time.monotonic()


def finish(settings: Mapping[str, Any], workplace: Path, log: Path) -> float:
    """Run to the end; returns the seconds from the first save on."""
    child = start(settings, workplace, log)
    saved = first_save(child, Path(settings["output_dir"]))
    child.join(timeout=600)
    assert child.exitcode == 0, log.read_text()[-3000:]
    return time.monotonic() - saved


def _killed(settings: Mapping[str, Any], workplace: Path, log: Path, *, step: int, after: float) -> bool:
    """Start a run and kill it some seconds after the save of a step; whether it was still alive."""
    child = start(settings, workplace, log)
    first_save(child, Path(settings["output_dir"]), step)
    child.join(timeout=after)
    child.kill()
    child.join()
    return bool(child.exitcode == -signal.SIGKILL)


def result(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor saved."""
    return {f"{file.name}:{name}": t for file in run.glob("*.safetensors") for name, t in load_file(file).items()}


def logged(run: Path) -> list[dict[str, Any]]:
    """What was logged, without clock times."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "train_runtime" not in line]
    return [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in lines]


def killed_and_whole_agree(case: Case, workplace: Path, folder: Path) -> str:
    """Run, run again with a kill on the way, and compare; returns when the kill came."""
    base(workplace, case.kind)
    whole, killed = (
        case.settings() | {"output_dir": str(folder / name), "resume": "auto"} for name in ("whole", "killed")
    )
    seconds = finish(whole, workplace, folder / "whole.log")
    draw, step, most = random.Random(f"{SEED} {case}"), 1, 0.9
    if case.objective in ONLINE:
        step, most = draw.choice(steps_inside(whole)), 0.05
    share = draw.uniform(0.0, most)
    # What runs beside it makes a run slower or faster than the last one; a kill that came too late is tried earlier.
    while not _killed(killed, workplace, folder / "killed.log", step=step, after=share * seconds):
        shutil.rmtree(folder / "killed")
        share /= 2
    had = [path.name for path in sorted((folder / "killed").glob("checkpoint-*"), key=checkpoint_step)]
    inside = f", {INSIDE}" if is_inside(folder / "killed") else ""
    finish(killed, workplace, folder / "killed.log")
    ours, theirs = result(folder / "killed"), result(folder / "whole")
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{case}: {len(different)} of {len(theirs)} tensors differ, such as {different[0]}"
    assert logged(folder / "killed") == logged(folder / "whole")
    if case.objective in ONLINE:
        assert drawing.read(folder / "killed.drawn") == drawing.read(folder / "whole.drawn")
    return f"{share:.0%} of the time after the save of step {step} or the first after it, with {', '.join(had)}{inside}"


def steps_inside(settings: Mapping[str, Any]) -> list[int]:
    """The steps of a run after which some completions are not used up, but for the last ones."""
    micro_batches = settings["steps_per_generation"] * settings["num_iterations"]
    steps = micro_batches // settings.get("gradient_accumulation_steps", 1)
    return [step for step in range(1, settings["max_steps"] - 2) if step % steps]


def is_inside(run: Path) -> bool:
    """Whether the checkpoint that a run goes on from holds completions."""
    complete = complete_checkpoints(run)
    file = complete[-1] / "rollouts_0.pt" if complete else run
    return file.is_file() and torch.load(file, weights_only=True)["buffer"] is not None


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_killed_equals_whole(case: Case, workplace: Path, tmp_path: Path) -> None:
    moment = killed_and_whole_agree(case, workplace, tmp_path)
    print(f"kills that resumed bitwise: 1 of 1 ({case}, at {moment})")


@pytest.mark.chaos
@pytest.mark.parametrize("what", LONG)
def test_killed_equals_whole_of_all(what: str, workplace: Path, tmp_path: Path) -> None:
    moments, faults = [], []
    for number, case in enumerate(LONG[what]):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            moment = killed_and_whole_agree(case, workplace, folder)
        except AssertionError as fault:
            faults.append(f"{case}: {fault}")
            print(f"  FAULT {case}: {str(fault)[-400:]}", flush=True)
        else:
            moments.append(moment)
            print(f"  {case}: killed at {moment}", flush=True)
            shutil.rmtree(folder)
    inside = sum(INSIDE in moment for moment in moments)
    print(f"kills that resumed bitwise, runs on {what}: {len(moments)} of {len(LONG[what])}")
    assert not faults, "\n".join(faults)
    if what == "completions":
        print(f"kills {INSIDE}: {inside} of {len(moments)}")
        assert inside >= 0.7 * len(moments) and len(moments) >= 24
    else:
        assert {case.kind for case in LONG[what]} >= set(MIXTURES) and len(LONG[what]) >= 57
