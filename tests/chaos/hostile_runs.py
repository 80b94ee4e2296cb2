"""Puts hostile files before real programs, and looks at what these did."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import yaml
from huggingface_hub import metadata_load
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM

from tests.chaos import hostile, hostile_models
from tests.chaos.hostile import SPRUNG, Hostile
from tests.programs.conftest import CONFIG, pairs, save_model, write_rows
from tests.programs.launching import Ended, Launcher

CORPUS = (*hostile.CORPUS, *hostile_models.CORPUS)
MOST_SECONDS = 30
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\ud800-\udfff]")
"""What a terminal must not get."""
DRAWN = re.compile("\r|\x1b\\[A|\x1b\\[[0-9]*m")
"""Where progress bars go, and how transformers colours a report where it was imported before the program began."""
SECRET = "what-lies-outside-the-workplace"


def make_workplace(place: Path) -> None:
    """A model, an adapter on it, rows, conversations, and a config that works with them."""
    save_model(place / "model")
    base = Qwen3ForCausalLM.from_pretrained(place / "model")
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(place / "adapter")
    hostile_models.changed("adapter_config.json", base_model_name_or_path="model")(place / "adapter")
    rows = pairs(16)
    write_rows(place / "rows.jsonl", rows)
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    talks = [{name: [{"role": role, "content": row[name]}] for name, role in roles.items()} for row in rows]
    write_rows(place / "talks.jsonl", talks)
    changes = {"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 1}
    values = {key: value for key, value in CONFIG.items() if key != "save_steps"}
    (place / "c.yaml").write_text(yaml.safe_dump({**values, **changes}))


def put_before(case: Hostile, launcher: Launcher, workplace: Path, folder: Path) -> None:
    """Run a case in a workplace of its own and assert what has to be true of all of them."""
    place = Path(shutil.copytree(workplace, folder / "place"))
    (folder / "secret.txt").write_text(SECRET)
    case.make(place)
    begun = time.perf_counter()
    ended = _bounded(launcher, case, place)
    took = time.perf_counter() - begun
    label = f"{case.kind}: {case.name}\n{ended.errors[-3000:]}"
    assert took < MOST_SECONDS, f"{took:.0f} s, {label}"
    assert not (place / SPRUNG).exists(), f"executed, {label}"
    shown = ended.output + ended.errors
    assert "Traceback" not in shown and SECRET not in shown, label
    assert not RAW.search(DRAWN.sub("", shown)), label
    if case.says is None:
        assert ended.exit_code == 0, label
    else:
        assert ended.exit_code == 2 and len(re.findall("^error: ", ended.errors, re.M)) == 1, label
        message = ended.errors[ended.errors.rindex("error: ") :]
        assert re.search(case.says, message), f"{case.says!r} is not in what it says, {label}"
        assert len(message) < 20_000, f"{len(message)} characters, {case.kind}: {case.name}"
    for card in place.glob("*/README.md"):
        if card.parent.name not in ("adapter", "model"):
            metadata = metadata_load(card) or {}
            assert set(metadata) <= {"library_name", "pipeline_tag", "tags", "base_model", "license"}, label
            assert metadata.get("license") != "evil", label
            assert not RAW.search(card.read_text()), label
    shutil.rmtree(place)


def _bounded(launcher: Launcher, case: Hostile, place: Path) -> Ended:
    """Run the program, and kill it where it takes too long."""
    (running,) = launcher.start(*case.words, directory=place, program=case.program)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.pid, signal.SIGKILL)

    timer = threading.Timer(MOST_SECONDS + 5, kill)
    timer.start()
    try:
        return running.wait()
    finally:
        timer.cancel()
