"""A run directory is never overwritten or resumed by accident, and ``run.json`` is always whole."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignkit.errors import RunDirectoryError
from alignkit.runs.directory import RUN_FILE, RunDirectory
from alignkit.runs.lock import LOCK_FILE
from alignkit.storage.durability import mark_complete
from alignkit.storage.manifest import MANIFEST
from tests.runs.saved import write_checkpoint

CONFIG = {
    "method": {"value": "flex_dpo", "source": "c.yaml:1"},
    "data": {"value": ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}], "source": "c.yaml:2"},
    "learning_rate": {"value": 1e-6, "source": "default"},
    "save_steps": {"value": 500, "source": "default"},
    "resume": {"value": False, "source": "default"},
}


def given(**changes: object) -> dict[str, dict[str, object]]:
    return {**CONFIG, **{key: {"value": value, "source": "command line"} for key, value in changes.items()}}


def earlier_run(path: Path, *, steps: tuple[int, ...] = (10, 20)) -> RunDirectory:
    """A run that was killed after its checkpoint of the last step, amid the next one."""
    run = RunDirectory.create(path)
    run.record(config=CONFIG, process_layout={"world_size": 2})
    for step in steps:
        run.manifest.claim_checkpoint(write_checkpoint(path, step))
        mark_complete(path / f"checkpoint-{step}")
    run.manifest.claim_checkpoint(write_checkpoint(path, 30))
    run.manifest.claim("metrics.jsonl", "adapter_model.safetensors", "tokenizer.json", "plot.png", "ref/w.safetensors")
    for name in ("metrics.jsonl", "adapter_model.safetensors", "tokenizer.json", "plot.png"):
        (path / name).write_text("written by the run")
    run.lock.release()
    return run


def files(path: Path) -> dict[str, bytes]:
    """Everything but the lock."""
    found = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != LOCK_FILE)
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


# --- refused, with the way out ---


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "`resume: true` to continue from checkpoint-20, `overwrite: true` to delete it .* another output_dir"),
        ({"resume": True, "overwrite": True}, "Keep one of the two"),
    ],
)
def test_an_earlier_run_is_not_touched_unasked(tmp_path: Path, options: dict[str, bool], advice: str) -> None:
    earlier_run(tmp_path)
    before = files(tmp_path)
    with pytest.raises(RunDirectoryError, match=advice):
        RunDirectory.create(tmp_path, **options)
    assert files(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_directory_that_no_run_wrote_is_not_touched(tmp_path: Path, options: dict[str, bool]) -> None:
    for name in ("thesis.tex", "README.md", "metrics.jsonl", "config.json"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match="README.md, config.json, metrics.jsonl and 1 more and no run.json"):
        RunDirectory.create(tmp_path, **options)
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("content", ["{}", "[]", '{"alignkit_run": 99}', "{", ""])
@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}])
def test_a_run_json_of_something_else_protects_the_directory(
    tmp_path: Path, content: str, options: dict[str, bool]
) -> None:
    (tmp_path / RUN_FILE).write_text(content)
    (tmp_path / "README.md").write_text("precious")
    with pytest.raises(RunDirectoryError, match="Write another output_dir"):
        RunDirectory.create(tmp_path, **options)
    assert (tmp_path / "README.md").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError, match=f"{tmp_path / 'file'} is a file. Write another output_dir"):
            RunDirectory.create(path)
    with pytest.raises(RunDirectoryError, match="no run to resume: .* is a file"):
        RunDirectory.create(tmp_path / "file", resume=True)


@pytest.mark.parametrize("exists", [True, False])
def test_an_unwritable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool) -> None:
    """Permissions do not bind root, hence a disk that is full."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes" if exists else "mkdir", full)
    with pytest.raises(RunDirectoryError, match=r"No space left on device\. Write an output_dir where you may write"):
        RunDirectory.create(tmp_path if exists else tmp_path / "new")


@pytest.mark.parametrize("make", [False, True])
def test_nothing_to_resume(tmp_path: Path, make: bool) -> None:
    path = tmp_path / "run"
    if make:
        path.mkdir()
    with pytest.raises(RunDirectoryError, match="no run to resume: .*(does not exist|is empty).*Remove `resume: true`"):
        RunDirectory.create(path, resume=True)
    assert path.exists() == make


def test_a_run_without_complete_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    earlier_run(tmp_path, steps=())
    with pytest.raises(RunDirectoryError, match="no complete checkpoint.*`overwrite: true` in place of `resume: true`"):
        RunDirectory.create(tmp_path, resume=True)
    with pytest.raises(RunDirectoryError, match="Write `overwrite: true` to delete it") as error:
        RunDirectory.create(tmp_path)
    assert "resume" not in str(error.value)


# --- accepted ---


def test_a_new_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "deep" / "run")
    sections = run.sections()
    assert sections["status"] == "running" and sections["sessions"][0]["resumed_from"] is None
    assert run.last_complete_checkpoint() is None
    assert {p.name for p in run.path.iterdir()} == {RUN_FILE, MANIFEST, LOCK_FILE}
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "empty")


def test_resuming_keeps_everything_and_tells_where_from(tmp_path: Path) -> None:
    earlier_run(tmp_path).record(status="failed: out of memory")
    before = files(tmp_path)
    run = RunDirectory.create(tmp_path, resume=True)
    after = files(tmp_path)
    assert after == before, "nothing is written before the settings have been compared"
    run.record(config=CONFIG)
    assert run.last_complete_checkpoint() == tmp_path / "checkpoint-20"
    sections = run.sections()
    assert sections["status"] == "running" and sections["config"] == CONFIG
    assert [session["resumed_from"] for session in sections["sessions"]] == [None, "checkpoint-20"]


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    """Of every kind of thing a user may keep in a run directory, beside and inside what the run wrote."""
    path, outside = tmp_path / "run", tmp_path / "outside"
    earlier_run(path)
    outside.mkdir()
    (outside / "precious.txt").write_text("precious")
    mine = (
        "notes.txt", "config.json", "model.safetensors", "runs/a", "logs/b", "ref/mine.txt", "deep/er/c", ".d.partial",
        "adapter/adapter_model.safetensors", "checkpoint-best/e", "checkpoint-10/notes.txt", "checkpoint-1000/f",
    )  # fmt: skip
    for name in mine:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
    (path / "ref" / "w.safetensors").write_text("written by the run")
    (path / "shortcut").symlink_to(outside)
    (path / "checkpoint-50").symlink_to(outside)
    (path / "checkpoint-10" / "link").symlink_to(outside)
    run = RunDirectory.create(path, overwrite=True)
    assert set(files(path)) == {*mine, RUN_FILE, MANIFEST}
    assert (outside / "precious.txt").read_text() == "precious"
    assert (path / "shortcut").is_symlink() and (path / "checkpoint-50").is_symlink()
    assert set(run.kept) == {name.partition("/")[0] for name in mine} | {"shortcut", "checkpoint-50"}
    assert list(run.sections()) == ["alignkit_run", "status", "sessions"]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "adapter_model.safetensors", "checkpoint-20", "README.md", "run.json"]
)
def test_a_link_in_the_place_of_a_file_of_the_run_is_not_followed(tmp_path: Path, name: str) -> None:
    path, target = tmp_path / "run", tmp_path / "target"
    earlier_run(path)
    if (path / name).exists():
        (path / name).rename(target)
    else:
        target.write_text("precious")
    (path / name).symlink_to(target)
    before = files(tmp_path)
    with pytest.raises(RunDirectoryError, match=f"{name} in it is a link"):
        RunDirectory.create(path, overwrite=True)
    assert files(tmp_path) == before and (path / name).is_symlink()


INPUTS = {
    "model": "run/final", "adapter": "run", "reference_model": "run/checkpoint-20",
    "helpful_reference_model": "run/final",
    "data": ["elsewhere.jsonl", {"path": "run/data/*.jsonl", "weight": 2.0}], "eval_data": "run/data/a.jsonl",
    "chat_template": "linked.jinja", "reference_cache": "run/data", "contrast_prompts": "run/data/a.jsonl",
    "a key of the future": {"deep": ["other/../run/data"]}, "model elsewhere with links": "linking",
}  # fmt: skip


@pytest.mark.parametrize("key", INPUTS)
def test_a_run_that_holds_an_input_is_not_overwritten(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier_run(tmp_path / "run")
    for name in ("run/final/config.json", "run/data/a.jsonl", "other/x", "linking/y", "elsewhere.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("precious")
    Path("linked.jinja").symlink_to("run/data/a.jsonl")
    Path("linking/weights").symlink_to("../run/adapter_model.safetensors")
    before = files(tmp_path)
    named = INPUTS[key] if isinstance(INPUTS[key], str) else "run/data"
    with pytest.raises(RunDirectoryError, match=re.escape(f"{key}: ")) as refusal:
        RunDirectory.create("run", overwrite=True, config=given(**{key: INPUTS[key]}))
    assert named in str(refusal.value) and files(tmp_path) == before


def test_inputs_elsewhere_do_not_hinder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    earlier_run(tmp_path / "run")
    Path("rows.jsonl").write_text("")
    elsewhere = given(model="owner/name", data=["rows.jsonl", "*.jsonl", "run"[:2] + "*/none*"], output_dir="run")
    RunDirectory.create("run", overwrite=True, config={**elsewhere, "text": {"value": "a\nb" * 999, "source": ""}})
    assert not Path("run/plot.png").exists()


def test_a_run_from_before_the_manifest(tmp_path: Path) -> None:
    """Exact names that are files, complete checkpoints, shards that the index names; the rest is kept and named."""
    earlier_run(tmp_path)
    (tmp_path / MANIFEST).unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    kept = ("model-mine.safetensors", "ref/adapter_model.safetensors", "runs/events", "vocab.json/mine", "logs/a")
    for name in (*kept, "model-00001-of-00001.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    unmarked = {f"checkpoint-30/{name}" for name in files(tmp_path / "checkpoint-30")}
    run = RunDirectory.create(tmp_path, overwrite=True)
    assert set(files(tmp_path)) == {*kept, *unmarked, RUN_FILE, MANIFEST}
    assert run.kept == ["checkpoint-30", "logs", "model-mine.safetensors", "ref", "runs", "vocab.json"]


def test_a_run_from_before_the_manifest_is_resumed(tmp_path: Path) -> None:
    """What is known to be its own is listed from then on."""
    earlier_run(tmp_path)
    (tmp_path / MANIFEST).unlink()
    run = RunDirectory.create(tmp_path, resume=True)
    run.record(config=CONFIG)
    assert [path.name for path in run.manifest.checkpoints()] == ["checkpoint-10", "checkpoint-20"]
    assert run.manifest.files() == {"metrics.jsonl", "adapter_model.safetensors", "tokenizer.json", "plot.png"}


@pytest.mark.parametrize("name", ["../precious", "{absolute}", "link/precious", "folder", "gone"])
def test_a_manifest_that_names_something_outside_deletes_nothing(tmp_path: Path, name: str) -> None:
    run = RunDirectory.create(tmp_path / "run")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run" / "link").symlink_to(tmp_path)
    (tmp_path / "run" / "folder").mkdir()
    run.manifest.claim(name.format(absolute=tmp_path / "precious"))
    run.lock.release()
    RunDirectory.create(tmp_path / "run", overwrite=True)
    assert (tmp_path / "precious").exists() and (tmp_path / "run" / "folder").exists()


def test_an_interrupted_overwrite_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier_run(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.create(tmp_path, overwrite=True)
    RunDirectory.create(tmp_path, overwrite=True)
    assert set(files(tmp_path)) == {RUN_FILE, MANIFEST}


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# --- run.json ---


@dataclass
class Layout:
    world_size: int
    path: Path


def test_sections_are_merged_and_made_plain(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.record(results={"before": {"accuracy": 0.5}}, layout=Layout(2, tmp_path), names={"b", "a"})
    run.record(results={"after": {"accuracy": math.nan}, "loss": (math.inf, 1)}, status="finished")
    sections = json.loads((tmp_path / RUN_FILE).read_text(), parse_constant=_interrupt)
    assert sections["results"] == {"before": {"accuracy": 0.5}, "after": {"accuracy": "nan"}, "loss": ["inf", 1]}
    assert sections["layout"] == {"world_size": 2, "path": str(tmp_path)}
    assert sections["names"] == ["a", "b"] and sections["status"] == "finished"


def test_a_kill_while_recording_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path)
    before = run.sections()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.record(status="finished")
    assert run.sections() == before


@pytest.fixture
def as_rank_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RANK", "1")
    yield


def test_other_ranks_do_nothing(tmp_path: Path, as_rank_one: None) -> None:
    run = RunDirectory.create(tmp_path / "run")
    assert not run.is_main and not run.path.exists()
    run.record(status="finished")
    run.check_resumable(CONFIG)
    assert not run.path.exists()
    earlier = earlier_run_on_main(tmp_path / "earlier")
    before = files(earlier)
    same = RunDirectory.create(earlier)
    assert same.last_complete_checkpoint() == earlier / "checkpoint-20" and files(earlier) == before


def earlier_run_on_main(path: Path) -> Path:
    RunDirectory.create(path, is_main=True)
    mark_complete(write_checkpoint(path, 20))
    return path


# --- the same settings ---


def test_the_same_settings_and_free_keys_resume(tmp_path: Path) -> None:
    run = earlier_run(tmp_path)
    run.check_resumable(given(save_steps=50, resume=True, report_to="tensorboard"), world_size=2)
    data = [*CONFIG["data"]["value"]]
    run.check_resumable(given(data=tuple(data)))


def test_every_changed_setting_is_listed_with_both_values(tmp_path: Path) -> None:
    run = earlier_run(tmp_path)
    with pytest.raises(RunDirectoryError) as error:
        run.check_resumable(given(learning_rate=1e-5, data="a.jsonl", save_steps=1), world_size=4)
    message = str(error.value)
    assert "learning_rate: 1e-06 (default) recorded, 1e-05 (command line) now" in message
    assert 'data: ["a.jsonl", {"path": "b.jsonl", "weight": 2.0}] (c.yaml:2) recorded, "a.jsonl"' in message
    assert "number of processes: 2 recorded, 4 now" in message
    assert "save_steps" not in message and f"`adapter: {tmp_path}`" in message


def test_a_key_that_one_side_lacks(tmp_path: Path) -> None:
    """As after an upgrade: at its default it is what the run did; otherwise it is not."""
    run = earlier_run(tmp_path)
    run.check_resumable({**CONFIG, "new": {"value": 1, "source": "default"}})
    run.check_resumable({key: entry for key, entry in CONFIG.items() if key != "learning_rate"})
    with pytest.raises(RunDirectoryError, match=r"new: absent recorded, 1 \(command line\) now"):
        run.check_resumable(given(new=1))
    with pytest.raises(RunDirectoryError, match=r'method: "flex_dpo" \(c.yaml:1\) recorded, absent now'):
        run.check_resumable({key: entry for key, entry in CONFIG.items() if key != "method"})


def test_no_torch_is_needed() -> None:
    code = "import sys, alignkit.runs.directory; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("recorded", "now", "accepted"),
    [
        ({"max_steps": 6}, {"max_steps": 10}, True),
        ({"max_steps": 6}, {"max_steps": 5}, False),
        ({"max_steps": -1}, {"max_steps": 10}, False),
        ({"max_steps": -1, "num_train_epochs": 1.0}, {"max_steps": -1, "num_train_epochs": 2.5}, True),
        ({"max_steps": -1, "num_train_epochs": 2.0}, {"max_steps": -1, "num_train_epochs": 1.0}, False),
    ],
)
def test_a_run_may_be_resumed_to_become_longer(
    tmp_path: Path, recorded: dict[str, float], now: dict[str, float], accepted: bool
) -> None:
    def config(values: dict[str, float]) -> dict[str, dict[str, Any]]:
        return {key: {"value": value, "source": "c.yaml:1"} for key, value in values.items()}

    run = RunDirectory.create(tmp_path / "run")
    run.record(config=config(recorded))
    if accepted:
        run.check_resumable(config(now))
        assert len(run.extended) == 1 and run.extended[0].endswith(" now")
    else:
        with pytest.raises(RunDirectoryError, match="cannot be resumed with other settings"):
            run.check_resumable(config(now))


def test_weights_that_no_run_can_go_on_from_are_exported_first(tmp_path: Path) -> None:
    def config(rate: float) -> dict[str, dict[str, Any]]:
        values = {"parametrization": "pat", "learning_rate": rate}
        return {key: {"value": value, "source": "c.yaml:1"} for key, value in values.items()}

    run = RunDirectory.create(tmp_path / "run")
    run.record(config=config(0.1))
    with pytest.raises(RunDirectoryError, match=r"export its result \(alignkit prune --adapter .*run --output DIR\)"):
        run.check_resumable(config(0.2))


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(RunDirectoryError, match=f"{tmp_path / 'link'} is a link that leads nowhere"):
        RunDirectory.create(tmp_path / "link")
